"""Chapter 3, the model: encoder, predictor, target encoder and loss.

A joint-embedding predictive architecture (JEPA) predicts the features of what is hidden, and not
its pixels. In: the patches of chapter 1 (B, N, E), the indices of chapter 2. Out: the loss.
Sources: I-JEPA (arXiv 2301.08243), section 3; Audio-JEPA (arXiv 2507.02915), section 2; ViT (arXiv
2010.11929). data.py has the key to the letters of the shapes.
"""

import copy

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from data import COLUMNS, PATCH, ROWS

SIZES = {"tiny": (192, 4), "small": (384, 12), "base": (768, 12)}   # width D, number of layers;
                                                                    # D / 64 heads; base is ViT-B


def select(tokens, indices):
    """Select from the tokens (B, N, any) of each clip those at its indices (B, n)."""
    return tokens.take_along_dim(indices[..., None], dim=1)


def normalize(x, dim):
    """x with mean 0 and variance 1 along a dimension."""
    x = x - x.mean(dim, keepdim=True)
    return x * (x.square().mean(dim, keepdim=True) + 1e-5).rsqrt()


def sincos_positions(rows, columns, width):
    """A fixed code for the row and column of every patch (N, width), because attention ignores
    order. Its first half holds sines and cosines of the row, its second half those of the column.
    Source: Attention is all you need (arXiv 1706.03762), 3.5; for images: MAE (2111.06377)."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))          # (N, 2)
    angles = grid[..., None] * frequencies                                          # (N, 2, D / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotations(rows, columns, width):
    """Rotary positions in time: by which angles attention turns the queries and keys of a head, for
    every patch, as cosines and sines (N, 2, width / 2).

    Not in the paper: it has fixed codes alone. Here the angles grow with the column of a patch, so
    the product of a query and a key tells how far apart in time two patches are, and what sounded
    a moment ago is found in one step, anywhere in the clip.
    Source: RoFormer (arXiv 2104.09864), section 3.2."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.arange(columns).repeat(rows)[:, None] * frequencies              # (N, width / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x, rotation):
    """Turn x (B, h, n, d) by the rotations (B or 1, n, 2, d / 2) of its tokens: each number of the
    first half makes a pair with one of the second half, the two coordinates of a point."""
    cos, sin = rotation[:, None].to(x.dtype).unbind(-2)                             # (B, 1, n, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Layer(nn.Module):
    """A pre-norm transformer layer on tokens (B, n, D): attention between them, an MLP on each."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, rotation):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d",
                            three=3, h=self.heads)                                  # (B, h, n, d)
        q, k = rotate(q, rotation), rotate(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def init_weights(model):
    """Xavier's uniform weights for every matrix, so that signals keep their size, and zero biases.
    Their deviation is 0.07 at width 192 and 0.04 at 768; I-JEPA draws normal ones of 0.02.
    Source: Glorot and Bengio, AISTATS 2010; used by ViT's and MAE's code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """A ViT: patches (B, N, E) -> latents (B, N, D), or (B, C, D) for the visible ones alone. The
    hidden ones are left out, not set to zero (MAE, arXiv 2111.06377, section 3). So they cost next
    to nothing, and the encoder never meets a placeholder that no real clip holds."""

    def __init__(self, width, n_layers):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.register_buffer("rotations", rotations(ROWS, COLUMNS, 64), persistent=False)
        self.layers = nn.ModuleList(Layer(width, width // 64) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        init_weights(self)

    def layer_outputs(self, patches, visible=None):
        """What each layer computes, a list of tensors like the latents, before the last norm."""
        x, rotation, outputs = self.embed(patches) + self.positions, self.rotations[None], []
        if visible is not None:
            x, rotation = select(x, visible), self.rotations[visible]               # (B, C, ...)
        for layer in self.layers:
            x = layer(x, rotation)
            outputs.append(x)
        return outputs

    def forward(self, patches, visible=None):
        return self.norm(self.layer_outputs(patches, visible)[-1])


class Predictor(nn.Module):
    """A narrow ViT: latents (B, C, D) of the visible patches -> predictions (B, K, D).

    A hidden patch enters as a mask token: one learned vector plus the patch's position. Because the
    predictor knows where to predict, the encoder need only describe what it sees. The predictor has
    half the encoder's width and depth, as in the paper, and is thrown away after training."""

    def __init__(self, encoder_width, encoder_layers):
        super().__init__()
        width, heads = encoder_width // 2, encoder_width // 64      # P; as many heads, half as wide
        self.embed = nn.Linear(encoder_width, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.register_buffer("rotations", rotations(ROWS, COLUMNS, 32), persistent=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(encoder_layers // 2))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, encoder_width)
        init_weights(self)

    def forward(self, latents, visible, hidden):
        context_tokens = self.embed(latents) + self.positions[visible]              # (B, C, P)
        mask_tokens = self.mask_token + self.positions[hidden]                      # (B, K, P)
        x = torch.cat([context_tokens, mask_tokens], dim=1)                         # (B, N, P)
        rotation = self.rotations[torch.cat([visible, hidden], dim=1)]
        for layer in self.layers:
            x = layer(x, rotation)
        return self.project(self.norm(x[:, visible.shape[1]:]))                     # (B, K, D)


class AudioJEPA(nn.Module):
    """Encoder, predictor and target encoder. Calling it computes the loss.

        latents     = encoder(visible patches)
        predictions = predictor(latents, visible, hidden)
        targets     = normalize(sum of normalize(layer) over target_encoder's layers), no gradient
        loss        = smooth_l1(predictions, targets[hidden])

    The target encoder sees all patches, so that a target tells what a patch means among the others
    (I-JEPA, section 3).

    The loss could fall to 0 if all clips came to have the same targets (collapse). Three things
    stand against it:
    - The targets have no gradient, so they cannot learn to be easy to predict (BYOL, 2006.07733).
    - They follow the encoder only slowly.
    - They are normalised so that every feature varies within every clip.
    One failure remains: targets that tell the place of a patch and not its sound. `spread` and
    `explained` in train.py show it."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.predictor = Encoder(*SIZES[size]), Predictor(*SIZES[size])
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)     # stop-gradient

    @torch.no_grad()
    def targets(self, patches):
        """The targets of all patches (B, N, D).

        Not in the paper: it takes the last layer alone. Here every layer is normalised over the
        patches of the clip, which removes what is the same in all of it (level, room) and so is
        easy to predict. Early layers say what a patch is, late ones what it means among the others;
        their sum holds both.
        Source: data2vec 2.0 (arXiv 2212.07525), 3.3, and EAT (2401.03497), 3.3."""
        outputs = self.target_encoder.layer_outputs(patches)
        total = sum(normalize(output.float(), dim=1) for output in outputs)         # over patches
        return normalize(total, dim=2)                                              # over features

    def forward(self, patches, visible, hidden):
        """patches (B, N, E), visible (B, C), hidden (B, K) -> loss (), predictions (B, K, D), and
        the targets of all patches (B, N, D)."""
        latents = self.encoder(patches, visible)                                    # (B, C, D)
        predictions = self.predictor(latents, visible, hidden).float()              # (B, K, D)
        all_targets = self.targets(patches)                                         # (B, N, D)
        # Smooth-L1 is half a square below 1 and linear beyond, so outliers do not dominate.
        loss = F.smooth_l1_loss(predictions, select(all_targets, hidden))
        return loss, predictions, all_targets

    @torch.no_grad()
    def update_target_encoder(self, momentum):
        """target_encoder = momentum * target_encoder + (1 - momentum) * encoder, after each step.
        This exponential moving average (BYOL, 3.1) changes slowly, so the targets hold still while
        the encoder learns to predict them, and the noise of single steps is smoothed."""
        for slow, fast in zip(self.target_encoder.parameters(), self.encoder.parameters(),
                              strict=True):
            slow.lerp_(fast, 1 - momentum)
