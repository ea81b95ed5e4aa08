"""Chapter 2, masking: which patches the encoder sees, and which the predictor must predict.

In: the kind of mask, the number of clips, seed and step. Out: the indices of the visible patches
(B, C) and of the hidden ones (B, K), on the grid of 8 rows (frequency) x 16 columns (time), counted
row by row. `python masking.py` draws them.
Sources: blocks, I-JEPA (arXiv 2301.08243), section 3; predicted at once, V-JEPA (2404.08471),
section 3; random, Audio-JEPA (2507.02915), section 2.
"""

import numpy as np
import torch
from torch.nn import functional as F

from data import COLUMNS, N_FRAMES, N_PATCHES, PATCH, ROWS, BuiltInSounds, LogMel, hop_samples

N_BLOCKS, BLOCK_COLUMNS = 4, 2        # blocks of 8 x 2 patches: half of the grid is hidden
HIDDEN_SHARE = 0.6                    # that random masks hide (paper: .4 to .6; Riou: .6)


def block_masks(n_clips, rng):
    """Four blocks, each two columns long and of all rows, that may touch and do not overlap.

    Not in the paper: it hides random patches, and I-JEPA's blocks leave rows above and below them
    visible. Then a hidden patch can be filled in from what sounds at the same moment. A block of
    all rows hides a whole moment, which must be predicted from other moments.
    Returns: (B, N), True where a patch is hidden."""
    # 12 slots in random order: 4 hidden ones, two columns wide, and 8 visible ones, one wide. The
    # argsort of random numbers is a random permutation, so just 4 of its numbers are below 4.
    # slots .?..?...??..  ->  columns .??..??...????..
    n_slots = COLUMNS - N_BLOCKS * (BLOCK_COLUMNS - 1)
    is_block = rng.random((n_clips, n_slots)).argsort(axis=1) < N_BLOCKS            # (B, 12)
    widths = np.where(is_block, BLOCK_COLUMNS, 1)
    columns = np.repeat(is_block.ravel(), widths.ravel())                           # (B * 16,)
    return np.tile(columns.reshape(n_clips, COLUMNS), ROWS)


def random_masks(n_clips, rng):
    """A random 60 % of the patches. The paper draws the share anew for every batch; one share keeps
    the shapes. Returns: (B, N), True where a patch is hidden."""
    return rng.random((n_clips, N_PATCHES)).argsort(axis=1) < round(HIDDEN_SHARE * N_PATCHES)


# A mask of your own is a function like these, (n_clips, rng) -> (B, N), that hides as many patches
# in every clip. So all shapes stay, and torch.compile need not compile again.
MASKS = {"block": block_masks, "random": random_masks}


def make_masks(kind, n_clips, seed, step):
    """The masks of one step, a pure function of (seed, step). Each patch is in just one of the two.
    Returns: visible (B, C), hidden (B, K), int64 patch indices."""
    is_hidden = MASKS[kind](n_clips, np.random.default_rng([seed, step]))
    n_visible = N_PATCHES - is_hidden[0].sum()
    assert (is_hidden.sum(axis=1) == is_hidden[0].sum()).all(), "clips differ in hidden patches"
    order = torch.from_numpy(is_hidden.argsort(axis=1, kind="stable"))   # the visible ones first
    return order[:, :n_visible], order[:, n_visible:]


def draw(spectrogram, hidden):
    """One clip's spectrogram (M, T) under its mask (K,) as text: time to the right, high bands on
    top. A patch is 2 lines of 4 characters, whose shades show the level, or `?` where hidden."""
    level = F.avg_pool2d(spectrogram[None], (PATCH // 2, PATCH // 4))[0]            # (16, 64)
    level = ((level - level.min()) / (level.max() - level.min()) * 4).round().int()
    text = np.array([*" ░▒▓█"])[level.numpy()]
    is_hidden = np.isin(np.arange(N_PATCHES), hidden).reshape(ROWS, COLUMNS)
    text[is_hidden.repeat(2, axis=0).repeat(4, axis=1)] = "?"
    return "\n".join(map("".join, text[::-1]))


if __name__ == "__main__":
    sound = next(BuiltInSounds().windows(20, hop_samples(1.28) * N_FRAMES))
    spectrogram = LogMel(1.28).log_mel(sound[None])[0]
    for kind in MASKS:
        visible, hidden = make_masks(kind, n_clips=1, seed=0, step=17)
        print(f"{kind} masks: {visible.shape[1]} of the {N_PATCHES} patches are visible, "
              f"{hidden.shape[1]} hidden and to be predicted, marked by ?")
        print(draw(spectrogram, hidden[0]), end="\n\n")
