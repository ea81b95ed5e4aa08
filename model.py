"""Chapter 3, the model: encoder, predictor, target encoder and loss.

In: the patches of chapter 1 (B, N, E) and the indices of chapter 2. Out: the loss.
Sources: I-JEPA (arXiv 2301.08243), section 3; Audio-JEPA (arXiv 2507.02915), section 2; ViT (arXiv
2010.11929). data.py has the key to the letters of the shapes.
"""

import copy

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F

from data import COLUMNS, PATCH, ROWS

WIDTHS = {"tiny": 192, "small": 384, "base": 768}    # D; all have 12 layers, and D / 64 heads

def select(tokens, indices):
    """Select from the tokens (B, N, any) of each clip those at its indices (B, ...)."""
    return tokens.take_along_dim(indices.flatten(1)[..., None], 1).unflatten(1, indices.shape[1:])

def sincos_positions(rows, columns, width):
    """A fixed code for the row and column of every patch (N, width), because attention ignores
    order. Its first half holds sines and cosines of the row, its second half those of the column.
    Source: Attention is all you need (arXiv 1706.03762), 3.5; for images: MAE (2111.06377)."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))        # (N, 2)
    angles = places[..., None] * frequencies                                        # (N, 2, D / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)

class Layer(nn.Module):
    """A pre-norm transformer layer on tokens (B, n, D): attention between them, an MLP on each."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d",
                            three=3, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)                          # (B, h, n, d)
        x = x + self.project(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))

def init_weights(model):
    """Xavier's uniform weights for every matrix, so that signals keep their size, and zero biases.
    I-JEPA draws normal weights of deviation 0.02, with which the layers of a narrow encoder start
    out nearly linear. Source: Glorot and Bengio, AISTATS 2010; used by ViT's and MAE's code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

class Encoder(nn.Module):
    """A ViT: patches (B, N, E) -> latents (B, N, D), or (B, C, D) for the visible ones alone. The
    hidden ones are left out, not set to zero (MAE, arXiv 2111.06377, section 3). So they cost
    nothing, and the encoder never meets a placeholder that no real clip holds."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.layers = nn.Sequential(*(Layer(width, width // 64) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        init_weights(self)

    def forward(self, patches, visible=None):
        positions = self.positions                                                  # (N, D)
        if visible is not None:
            patches, positions = select(patches, visible), positions[visible]       # (B, C, ...)
        return self.norm(self.layers(self.embed(patches) + positions))

class Predictor(nn.Module):
    """A narrow ViT: latents (B, C, D) of the visible patches -> predictions (B, M, K, D).

    A hidden patch enters as a mask token: one learned vector plus the patch's position. Each block
    is predicted without sight of the others. Because the predictor knows where to predict, the
    encoder need only describe what it sees. It has half the encoder's width and depth, as in the
    paper, and is thrown away after training."""

    def __init__(self, encoder_width):
        super().__init__()
        width, heads = encoder_width // 2, encoder_width // 64                      # P
        self.embed = nn.Linear(encoder_width, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(6)))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, encoder_width)
        init_weights(self)

    def forward(self, latents, visible, hidden):
        M, K = hidden.shape[1:]
        context_tokens = self.embed(latents) + self.positions[visible]              # (B, C, P)
        mask_tokens = self.mask_token + self.positions[hidden]                      # (B, M, K, P)
        x = torch.cat([repeat(context_tokens, "b c p -> (b m) c p", m=M),
                       rearrange(mask_tokens, "b m k p -> (b m) k p")], dim=1)     # (B M, C + K, P)
        predicted = self.norm(self.layers(x)[:, -K:])                               # (B M, K, P)
        return rearrange(self.project(predicted), "(b m) k d -> b m k d", m=M)

def variance_covariance(latents):
    """How far the features of latents (B, C, D) are from unit variance and from independence.

        mean over features of  max(0, 1 - std) + 0.1 * (its squared covariances with the others)

    Constant features are the easiest to predict (collapse); the variance term forbids them.
    Features that encode only position are the next easiest. N positions allow at most N - 1
    uncorrelated ones, so decorrelation pushes the others to describe sound.
    Source: VICReg (arXiv 2105.04906), 4.1, with 0.04 for 0.1; in a JEPA: C-JEPA (2410.19560)."""
    with torch.autocast(latents.device.type, enabled=False):                        # in float32
        features = latents.float().flatten(0, 1)                                    # (B C, D)
        features = features - features.mean(0)
        covariances = features.T @ features / len(features)                         # (D, D)
        variances = covariances.diagonal()
        variance = F.relu(1 - (variances + 1e-4).sqrt()).mean()      # 1e-4: a root is steep at 0
        covariance = (covariances.square().sum() - variances.square().sum()) / len(variances)
        return variance + 0.1 * covariance

class AudioJEPA(nn.Module):
    """Encoder, predictor and target encoder. Calling it computes the loss.

        loss = smooth_l1(predictions, targets) + variance_covariance(latents)

        latents     = encoder(visible patches)
        predictions = predictor(latents, visible, hidden)
        targets     = layer_norm(target_encoder(all patches))[hidden], with no gradient

    The target encoder sees all patches, so that a target tells what a patch means among the others
    (I-JEPA, section 3). Its output is normalised over the features without a learned scale, by
    which the targets, and the loss with them, could shrink (I-JEPA's code).

    The loss would be least if all patches had the same targets (collapse). Three things stand
    against it. The targets have no gradient, so they cannot learn to be easy to predict (BYOL,
    arXiv 2006.07733, 3.1). They follow the encoder only slowly. Both slow collapse down; what makes
    it expensive is the variance and covariance of the latents."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.predictor = Encoder(WIDTHS[size]), Predictor(WIDTHS[size])
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)     # stop-gradient

    def forward(self, patches, visible, hidden):
        """patches (B, N, E), visible (B, C), hidden (B, M, K) -> loss (), predictions (B, M, K, D),
        and the targets of all patches (B, N, D)."""
        latents = self.encoder(patches, visible)                                    # (B, C, D)
        predictions = self.predictor(latents, visible, hidden).float()              # (B, M, K, D)
        outputs = self.target_encoder(patches).float()                              # (B, N, D)
        all_targets = F.layer_norm(outputs, outputs.shape[-1:])                     # (B, N, D)
        targets = select(all_targets, hidden)                                       # (B, M, K, D)
        # Smooth-L1 is half a square below 1 and linear beyond, so outliers do not dominate.
        loss = F.smooth_l1_loss(predictions, targets) + variance_covariance(latents)
        return loss, predictions, all_targets

    @torch.no_grad()
    def update_target_encoder(self, momentum):
        """target_encoder = momentum * target_encoder + (1 - momentum) * encoder, after each step.
        This exponential moving average (BYOL, 3.1) changes slowly, so the targets hold still while
        the encoder learns to predict them, and the noise of single steps is smoothed."""
        torch._foreach_lerp_(list(self.target_encoder.parameters()),
                             list(self.encoder.parameters()), 1 - momentum)
