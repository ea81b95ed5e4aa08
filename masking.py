"""Chapter 2, masking: which patches the encoder sees, and which the predictor must predict.

`make_masks` returns the indices of the visible patches (B, C) and of the hidden ones (B, K). The
grid has 8 rows (frequency) x 16 columns (time), numbered row by row. Run masking.py to draw masks.
Sources: I-JEPA (arXiv 2301.08243), section 3 (blocks); Audio-JEPA (2507.02915), section 2 (random).
"""

import numpy as np
import torch
from torch.nn import functional as F

from data import COLUMNS, N_PATCHES, PATCH, ROWS, BuiltInSounds, LogMel, make_output_printable

N_BLOCKS, BLOCK_COLUMNS = 4, 2        # blocks of 8 x 2 patches: half of the grid is hidden


def block_masks(n_clips, rng):
    """Hide four blocks, each two columns wide and full height; they may touch but not overlap.

    Not in the paper: it masks random patches. They, like I-JEPA's blocks, can be interpolated from
    the same moment; full-height blocks cannot. Returns: (B, N), True where hidden."""
    # Shuffle 12 slots: 4 become hidden blocks of two columns, 8 become single visible columns.
    # slots .?..?...??..  ->  columns .??..??...????..
    n_slots = COLUMNS - N_BLOCKS * (BLOCK_COLUMNS - 1)
    is_block = rng.random((n_clips, n_slots)).argsort(axis=1) < N_BLOCKS            # (B, 12)
    columns = np.repeat(is_block, np.where(is_block, BLOCK_COLUMNS, 1).ravel())     # (B * 16,)
    return np.tile(columns.reshape(n_clips, COLUMNS), ROWS)


def random_masks(n_clips, rng):
    """Hide a random half of the patches. The paper draws 40 to 60 % for each batch; a fixed ratio
    keeps shapes constant. Returns: (B, N), True where a patch is hidden."""
    return rng.random((n_clips, N_PATCHES)).argsort(axis=1) < N_PATCHES // 2


# Add your own mask here. It must hide the same number of patches in every clip (constant shapes).
MASKS = {"block": block_masks, "random": random_masks}


def make_masks(kind, n_clips, seed, step):
    """The masks of one step, a pure function of (seed, step). Every patch is in exactly one.
    Returns: visible (B, C), hidden (B, K), int64 patch indices."""
    is_hidden = MASKS[kind](n_clips, np.random.default_rng([seed, step]))
    n_hidden = is_hidden.sum(axis=1)
    assert (n_hidden == n_hidden[0]).all(), "clips differ in the number of hidden patches"
    order = torch.from_numpy(is_hidden.argsort(axis=1, kind="stable"))   # visible patches first
    return order[:, :-n_hidden[0]], order[:, -n_hidden[0]:]


def draw(spectrogram, hidden):
    """One clip's spectrogram (M, T) under its mask (K,) as text: time to the right, high bands on
    top. A patch is 2 lines of 4 characters: shades of the level, or `?` where hidden."""
    level = F.avg_pool2d(spectrogram[None], (PATCH // 2, PATCH // 4))[0]            # (16, 64)
    level = ((level - level.min()) / (level.max() - level.min()) * 4).round().int()
    text = np.array([*" ░▒▓█"])[level.numpy()]
    is_hidden = np.isin(np.arange(N_PATCHES), hidden).reshape(ROWS, COLUMNS)
    text[is_hidden.repeat(2, axis=0).repeat(4, axis=1)] = "?"
    return "\n".join(map("".join, text[::-1]))


if __name__ == "__main__":
    make_output_printable()
    mel = LogMel(1.28)
    sound = next(BuiltInSounds(mel.clip_samples).windows(20, mel.clip_samples))
    for kind in MASKS:
        visible, hidden = make_masks(kind, n_clips=1, seed=0, step=17)
        print(f"{kind} masks: {visible.shape[1]} of the {N_PATCHES} patches are visible, "
              f"{hidden.shape[1]} are hidden (?)")
        print(draw(mel.log_mel(sound[None])[0], hidden[0]), end="\n\n")
