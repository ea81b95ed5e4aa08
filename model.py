"""Chapter 3, the model: encoder, predictor, target encoder and loss.

A joint-embedding predictive architecture (JEPA) predicts features of the hidden patches instead of
their pixels. Patches (B, N, E) and masks in, the loss out. data.py explains the letters.
Sources: I-JEPA (arXiv 2301.08243), section 3; Audio-JEPA (2507.02915), section 2; ViT (2010.11929).
"""

import copy
import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from data import COLUMNS, PATCH, ROWS

SIZES = {"tiny": (192, 4), "small": (384, 4), "base": (768, 12)}    # width D, layers; base is ViT-B
HEAD_WIDTH = 64                       # width of a head of the encoder
TARGETS, POSITIONS = ("last", "all"), ("fixed", "rotary")


def select(tokens, indices):
    """For each clip, select the tokens (B, N, any) at its indices (B, n)."""
    return tokens.take_along_dim(indices[..., None], dim=1)


def to_columns(tokens):
    """Put the 8 patches of a column side by side: tokens (B, N, D) -> (B, T', D')."""
    return rearrange(tokens, "b (row column) d -> b column (row d)", row=ROWS)


def normalize(x, dim):
    """Shift and scale x to mean 0 and variance 1 along a dimension."""
    x = x - x.mean(dim, keepdim=True)
    return x * (x.square().mean(dim, keepdim=True) + 1e-5).rsqrt()


def sincos_positions(width):
    """Fixed position embeddings (N, width), because attention alone ignores order: sines and
    cosines of the row in the first half, of the column in the second.
    Source: Attention is all you need (arXiv 1706.03762), 3.5; for images: MAE (2111.06377)."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    grid = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))          # (N, 2)
    angles = grid[..., None] * frequencies                                      # (N, 2, width / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotations(width, positions):
    """Cosines and sines (N, 2, width / 2) of the angles by which attention rotates the queries and
    keys of each patch; width is that of a head. With "fixed" positions all angles are 0.

    Not in the paper: "rotary" angles grow with the column of a patch, so q . k depends on the
    distance in time, and one layer can attend to "one note ago" anywhere in the clip.
    Source: RoFormer (arXiv 2104.09864), section 3.2."""
    frequencies = 1 / 10_000 ** (torch.arange(width // 2) / (width // 2))
    columns = torch.arange(COLUMNS).repeat(ROWS) * (positions == "rotary")          # (N,)
    angles = columns[:, None] * frequencies                                         # (N, width / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x, rotation):
    """Rotate queries or keys x (B, h, n, d) by (B or 1, n, 2, d / 2). Value i of each half is a
    coordinate of point i."""
    cos, sin = rotation[:, None].to(x.dtype).unbind(-2)                             # (B, 1, n, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Layer(nn.Module):
    """A pre-norm transformer layer on tokens (B, n, D): attention, then an MLP."""

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
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)                 # (B, h, n, n)
        x = x + self.project(rearrange(attention @ v, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def init_weights(module):
    """Xavier-uniform weights (Glorot and Bengio, AISTATS 2010), zero biases, as in ViT and MAE."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """A ViT: patches (B, N, E) -> latents (B, N, D), or (B, C, D) if `visible` is given. Hidden
    patches are left out, as in MAE (arXiv 2111.06377), so the encoder never sees a mask token."""

    def __init__(self, width, n_layers, positions):
        super().__init__()
        assert width % HEAD_WIDTH == 0, f"the width {width} is not a multiple of {HEAD_WIDTH}"
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.register_buffer("position_embeddings", sincos_positions(width), persistent=False)
        self.register_buffer("rotations", rotations(HEAD_WIDTH, positions), persistent=False)
        self.layers = nn.ModuleList(Layer(width, width // HEAD_WIDTH) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        init_weights(self)

    def layer_outputs(self, patches, visible=None):
        """The output of every layer, before the final norm: a list of (B, N or C, D)."""
        x, rotation = self.embed(patches) + self.position_embeddings, self.rotations[None]
        if visible is not None:
            x, rotation = select(x, visible), self.rotations[visible]               # (B, C, ...)
        outputs = []
        for layer in self.layers:
            x = layer(x, rotation)
            outputs.append(x)
        return outputs

    def forward(self, patches, visible=None):
        return self.norm(self.layer_outputs(patches, visible)[-1])


class Predictor(nn.Module):
    """A narrow ViT: latents (B, C, D) of the visible patches -> predictions (B, K, D) of the hidden
    ones. A hidden patch enters as a mask token: one learned vector plus its position. Half the
    encoder's width and depth, as in the paper; discarded after training."""

    def __init__(self, encoder_width, encoder_layers, positions):
        super().__init__()
        width, heads = encoder_width // 2, encoder_width // HEAD_WIDTH              # P
        self.project_in = nn.Linear(encoder_width, width)
        self.register_buffer("position_embeddings", sincos_positions(width), persistent=False)
        self.register_buffer("rotations", rotations(width // heads, positions), persistent=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(encoder_layers // 2))
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, encoder_width)
        init_weights(self)

    def forward(self, latents, visible, hidden):
        context_tokens = self.project_in(latents) + self.position_embeddings[visible]
        mask_tokens = self.mask_token + self.position_embeddings[hidden]            # (B, K, P)
        x = torch.cat([context_tokens, mask_tokens], dim=1)                         # (B, N, P)
        rotation = self.rotations[torch.cat([visible, hidden], dim=1)]
        for layer in self.layers:
            x = layer(x, rotation)
        return self.project_out(self.norm(x[:, visible.shape[1]:]))                 # (B, K, D)


class AudioJEPA(nn.Module):
    """Encoder, predictor and target encoder. Calling it computes the loss:

        latents     = encoder(patches[visible])
        predictions = predictor(latents, visible, hidden)
        targets     = normalize(target_encoder(patches))                    no gradient
        loss        = smooth_l1(predictions, targets[hidden])

    The target encoder is a moving average of the encoder, and sees all patches. The cheapest
    solution would be the same target for every clip (collapse). Targets without a gradient cannot
    be trained towards it (BYOL, arXiv 2006.07733), and the average changes slowly. Targets that
    encode position but not content remain possible: watch `spread` and `explained` in the log."""

    def __init__(self, size, positions, target_layers):
        super().__init__()
        self.encoder = Encoder(*SIZES[size], positions)
        self.predictor = Predictor(*SIZES[size], positions)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_layers = target_layers

    @torch.no_grad()
    def targets(self, patches):
        """The targets of all patches, (B, N, D). "last": the target encoder's output, normalised
        over its features, as in I-JEPA's code.

        Not in the paper: "all" sums the outputs of all layers (before the final norm), each
        normalised over the patches of its clip. This removes what is constant over the clip (level,
        room) and so trivial to predict. Early layers describe the patch, late ones its context.
        Source: data2vec 2.0 (arXiv 2212.07525), 3.3, and EAT (2401.03497), 3.3."""
        if self.target_layers == "last":
            return normalize(self.target_encoder(patches).float(), dim=2)           # over features
        assert self.target_layers == "all", self.target_layers
        outputs = self.target_encoder.layer_outputs(patches)
        total = sum(normalize(output.float(), dim=1) for output in outputs)         # over patches
        return normalize(total, dim=2)                                              # over features

    def forward(self, patches, visible, hidden):
        """Patches (B, N, E), visible (B, C), hidden (B, K) -> loss, predictions, all targets."""
        latents = self.encoder(patches, visible)                                    # (B, C, D)
        predictions = self.predictor(latents, visible, hidden).float()              # (B, K, D)
        all_targets = self.targets(patches)                                         # (B, N, D)
        # Smooth-L1 is quadratic below 1 and linear beyond, so outliers do not dominate.
        loss = F.smooth_l1_loss(predictions, select(all_targets, hidden))
        return loss, predictions, all_targets

    @torch.no_grad()
    def update_target_encoder(self, momentum):
        """Exponential moving average (BYOL, section 3.1), after each step:
        target_encoder = momentum * target_encoder + (1 - momentum) * encoder."""
        for name, weights in self.encoder.named_parameters():
            self.target_encoder.get_parameter(name).lerp_(weights, 1 - momentum)
