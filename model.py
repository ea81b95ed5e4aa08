"""Chapter 3, the model: encoder, predictor, and the slow copy that sets the predictor's goals.

In: normalised log-mel spectrograms, cut into patches, and the patch indices of chapter 2. Out: the loss; and, at the end of
the file, a trained encoder for use.
Sources: I-JEPA (arXiv 2301.08243), section 3; Audio-JEPA (arXiv 2507.02915), section 2; ViT (arXiv 2010.11929).

The letters of all shapes in this project:
    B clips              S samples of a clip (32 kHz)     F mel bands (128)       T frames (256)
    N patches (128)      C patches of the context         M target blocks         K patches of one block
    D encoder width      P predictor width                E values of one patch (16 x 16 = 256)
    T' embeddings of a clip, one a column of patches      D' = 8 D, their size: the 8 patches of a column side by side
"""

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from data import N_MELS, SAMPLE_RATE, InputError, LogMel, resampler
from masking import COLUMNS, ROWS

PATCH = N_MELS // ROWS                # 16 bands x 16 frames
WIDTHS = {"tiny": 192, "small": 384, "base": 768}     # D of each size; all have 12 layers, and a head for each 64 of D


def patchify(spectrograms):
    """Cut spectrograms (B, F, T) into patches (B, N, E), row by row: all columns of the lowest 16 bands first."""
    return rearrange(spectrograms, "b (row f) (column t) -> b (row column) (f t)", f=PATCH, t=PATCH)


def take(tokens, indices):
    """Pick from the tokens (B, N, any width) of each clip those at its indices (B, ...) -> (B, ..., that width)."""
    return tokens.take_along_dim(indices.flatten(1)[..., None], dim=1).unflatten(1, indices.shape[1:])


def sincos_positions(rows, columns, width):
    """Fixed positions (N, width), for attention sees a set: sines and cosines of the row, then those of the column.

    Source: Attention is all you need (arXiv 1706.03762), 3.5, in two dimensions as in MAE (arXiv 2111.06377).
    """
    frequencies = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))       # (N, 2): the row and column of each patch
    angles = places[..., None] * frequencies                                       # (N, 2, width / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Layer(nn.Module):
    """One pre-norm transformer layer: tokens (B, n, D) exchange information (attention), then each thinks (MLP)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, n, D / heads)
        x = x + self.project(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def init_weights(model):
    """Xavier's uniform weights for every matrix, as in ViT's and MAE's code, so that signals keep their size; zero biases.

    With I-JEPA's normal ones of deviation 0.02 the layers of a narrow encoder start out nearly linear, and the first goals say
    little of the sound; the README, Results, compares. Source: Glorot and Bengio, AISTATS 2010.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """ViT over patches (B, N, E), or only those of the context (B, C) -> latents (B, N or C, D).

    The others are dropped, not zeroed (MAE, arXiv 2111.06377, section 3): they cost nothing, and the encoder never meets a
    placeholder that no clip holds.
    """

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.layers = nn.Sequential(*(Layer(width, width // 64) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        init_weights(self)

    def forward(self, patches, context=None):
        positions = self.positions                                                 # (N, D)
        if context is not None:
            patches, positions = take(patches, context), positions[context]        # (B, C, E), (B, C, D)
        return self.norm(self.layers(self.embed(patches) + positions))


class Predictor(nn.Module):
    """A narrow ViT: from the context's latents (B, C, D), guess the goals at `targets` (B, M, K) -> (B, M, K, D).

    A hidden patch enters as one learned token plus its position. Without a predictor (BYOL, arXiv 2006.07733, found it
    essential) the latents of the visible patches would themselves have to equal those of the hidden ones, easiest if all were
    alike. Each block is predicted without sight of the others. Half the encoder's width and depth, as in the paper: a narrow
    one did better in I-JEPA's ablations (a deeper one, too, but it costs more).
    """

    def __init__(self, encoder_width):
        super().__init__()
        width, heads = encoder_width // 2, encoder_width // 64                     # P; as many heads as the encoder
        self.embed = nn.Linear(encoder_width, width)
        self.register_buffer("positions", sincos_positions(ROWS, COLUMNS, width), persistent=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))    # small: the place counts
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(6)))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, encoder_width)
        init_weights(self)

    def forward(self, latents, context, targets):
        M, K = targets.shape[1:]
        known = self.embed(latents) + self.positions[context]                      # (B, C, P)
        asked = self.mask_token + self.positions[targets]                          # (B, M, K, P)
        known, asked = repeat(known, "b c p -> (b m) c p", m=M), rearrange(asked, "b m k p -> (b m) k p")
        x = torch.cat([known, asked], dim=1)                                       # (B M, C + K, P): each block by itself
        guesses = self.norm(self.layers(x)[:, -K:])                                # (B M, K, P)
        return rearrange(self.project(guesses), "(b m) k d -> b m k d", m=M)


def redundancy(latents):
    """How far the features of latents (B, C, D) fall short of a deviation of 1, and how much they repeat one another.

        redundancy = mean over features of (max(0, 1 - deviation) + 0.1 * sum of its squared covariances with the others)

    Constant features are the easiest to predict (collapse): the first term, too_small, penalises them. The next easiest depend
    on the place alone: the second, repeated, limits them, for N places allow at most N - 1 uncorrelated features.
    VICReg's own weight for it is 0.04; the README compares.
    Source: variance and covariance terms of VICReg (arXiv 2105.04906), 4.1; in a JEPA: C-JEPA (arXiv 2410.19560).
    """
    with torch.autocast(latents.device.type, enabled=False):
        tokens = latents.float().flatten(0, 1)                                     # (B C, D)
        tokens = tokens - tokens.mean(0)
        covariance = tokens.T @ tokens / len(tokens)                               # (D, D); torch.cov would break the graph
        variance = covariance.diagonal()
        too_small = F.relu(1 - (variance + 1e-4).sqrt()).mean()                    # 1e-4: a root is infinitely steep at 0
        repeated = (covariance.square().sum() - variance.square().sum()) / len(variance)             # less each with itself
        return too_small + 0.1 * repeated


class AudioJEPA(nn.Module):
    """Encoder, predictor and target; calling it computes the loss."""

    def __init__(self, size):
        super().__init__()
        self.encoder, self.predictor = Encoder(WIDTHS[size]), Predictor(WIDTHS[size])
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)            # stop-gradient: the EMA alone moves it

    def all_goals(self, patches):
        """What the predictor should find anywhere: the output of a target that sees all patches (B, N, E) -> (B, N, D).

        All, as in I-JEPA (section 3), so that a goal tells what a patch means among the others; Riou et al. found a target that
        sees the hidden ones alone better. It gets no gradient (stop-gradient; BYOL, 3.1), or it would learn to set easy goals.
        Normalised over the features, as in I-JEPA's code: the target's own last norm has a learned scale, by which the goals
        could shrink and the loss with them; this one has none.
        """
        outputs = self.target(patches).float()
        return F.layer_norm(outputs, outputs.shape[-1:])

    def forward(self, patches, context, targets):
        """patches (B, N, E), context (B, C), targets (B, M, K) -> loss (), predictions and goals (B, M, K, D).

            loss = smooth-L1(predictions, goals) + redundancy(latents)

        smooth-L1, as in I-JEPA's code: a square below 1, beyond it linear, so that a few wild gaps do not rule the gradient.
        """
        latents = self.encoder(patches, context)                                   # (B, C, D)
        predictions = self.predictor(latents, context, targets).float()            # (B, M, K, D)
        goals = take(self.all_goals(patches), targets)                             # (B, M, K, D)
        loss = F.smooth_l1_loss(predictions, goals) + redundancy(latents)
        return loss, predictions, goals

    @torch.no_grad()
    def update_target(self, momentum):
        """target = momentum * target + (1 - momentum) * encoder: an exponential moving average (BYOL, 3.1).

        Meant to be so slow that the two cannot agree on a trivial answer, while it smooths the encoder's noise.
        """
        torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1 - momentum)


# ---- a trained encoder, for use -------------------------------------------------------------------------------------------

def load_checkpoint(path):
    """The content of a checkpoint, on the CPU; nothing in the file is executed. Raises InputError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:                                                     # a damaged pickle can raise anything
        raise InputError(f"{path}: no checkpoint that can be read ({type(error).__name__})") from error
    needed = {"config", "step", "log", "unusable", "n_clips"}                      # what else is missing, `restore` says
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "audio-jepa 1" or not needed <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of train.py, or an incomplete one")
    return checkpoint


def restore(part, checkpoint, name):
    """Load checkpoint[name] into `part` (a module, an optimiser). Raises InputError if it does not fit."""
    try:
        part.load_state_dict(checkpoint[name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the checkpoint's '{name}' is missing or does not fit its settings") from error


class Embedder(nn.Module):
    """Waveforms in, embeddings over time out, one every `hop_seconds` (a column of patches), `output_dim` numbers each (D').

    The 8 patches of a column are kept apart, side by side, as by Riou et al. (arXiv 2405.08679): averaged, they would mix high
    with low. The README, Results, compares.
    """

    def __init__(self, size, seconds):
        super().__init__()
        self.mel, self.encoder = LogMel(seconds), Encoder(WIDTHS[size])
        self.column_samples = PATCH * self.mel.hop
        self.window_samples = COLUMNS * self.column_samples                        # the training length
        self.output_dim, self.hop_seconds = ROWS * WIDTHS[size], self.column_samples / SAMPLE_RATE

    @torch.no_grad()
    def forward(self, waveform, sample_rate):
        """Floats (S,) or (B, S) at `sample_rate` Hz -> (B, T', D'), for all columns with sound. Raises ValueError.

        Long audio goes through in windows of the training length, 32 at a time; windows know nothing of one another.
        """
        device = self.mel.mean.device
        waveform = torch.atleast_2d(torch.as_tensor(waveform)).cpu()
        if waveform.shape[1] == 0 or not waveform.is_floating_point():
            raise ValueError("a waveform without samples, or of integers instead of floats from -1 to 1")
        waveform = resampler(sample_rate)(waveform.float())                        # (B, S)
        padded = F.pad(waveform, (0, -waveform.shape[1] % self.window_samples))    # to whole windows
        batches = rearrange(padded, "b (window s) -> (b window) s", s=self.window_samples).split(32)
        tokens = torch.cat([self.encoder(patchify(self.mel(part.to(device)))).float() for part in batches])
        columns = rearrange(tokens, "(b window) (row column) d -> b (window column) (row d)", b=len(waveform), row=ROWS)
        return columns[:, :math.ceil(waveform.shape[1] / self.column_samples)]     # (B, T', D')


def load_encoder(path, which="target", layer=None):
    """The encoder of a checkpoint as an Embedder, on the CPU; its `config` is that of the run. Raises InputError.

    which: "target", the average that gave the goals; "context", the encoder that was trained; or "untrained", fresh weights.
    layer: the one to take the output of, counted from 1, before the last norm.
    """
    checkpoint = load_checkpoint(path)
    embedder = Embedder(checkpoint["config"]["model"], checkpoint["config"]["seconds"])
    embedder.config = checkpoint["config"]
    restore(embedder.mel, checkpoint, "mel")
    vit = embedder.encoder
    if which != "untrained":
        restore(vit, checkpoint, {"target": "target", "context": "encoder"}[which])
    if layer is not None:
        if not 1 <= layer <= len(vit.layers):
            raise InputError(f"there is no layer {layer}; the encoder has {len(vit.layers)}")
        vit.layers, vit.norm = vit.layers[:layer], nn.Identity()
    return embedder.eval()
