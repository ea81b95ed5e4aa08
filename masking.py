"""Chapter 2, masking: which patches the encoder sees, and which the predictor must predict.

In: the kind of mask, the number of clips, seed and step. Out: the indices of the visible patches
(B, C) and of the hidden ones to predict (B, M, K), on the grid of 8 rows (frequency) x 16 columns
(time), counted row by row. No patch is in both. `python masking.py` draws them.
Sources: blocks, I-JEPA (arXiv 2301.08243), section 3; random, Audio-JEPA (2507.02915), section 2.
Columns are our own.
"""

import sys

import torch

from data import COLUMNS, N_FRAMES, N_PATCHES, PATCH, ROWS, BuiltInSounds, LogMel, hop_samples

N_BLOCKS = 4                          # M, blocks to predict in each clip
BLOCK_SHAPES = ((3, 8), (4, 6))       # rows x columns: 24 patches, 19 % of the grid (I-JEPA: 15 to
                                      # 20 %), longer than high on a grid that is longer than high
HIDDEN_SHARE = 0.6                    # that random masks hide (paper: .4 to .6; Riou: .6)

def block_masks(n_clips, generator):
    """Four blocks to predict, each on its own, and visible patches outside all of them.

    A block hides a whole event, where a lone hidden patch could be filled in from its neighbours.
    Blocks may overlap; four that do not would leave 32 of the 128 patches, so 32 of those that are
    left are visible, drawn at random. I-JEPA draws a new size at every step. Here every block has
    24 patches, so all shapes stay and torch.compile need not compile again. Blocks inside a grid
    favour its middle: one block covers a corner in 2 % of all draws and a patch in the middle in
    44 %, so four of them hide the corner in 7 % of the clips, the middle in 90 %.
    Returns: visible (B, C), hidden (B, M, K), int64 patch indices."""
    shapes = torch.tensor(BLOCK_SHAPES)                                 # (n_shapes, 2)
    offsets = torch.stack([(torch.arange(rows)[:, None] * COLUMNS + torch.arange(columns)).flatten()
                           for rows, columns in BLOCK_SHAPES])        # (n_shapes, K), from a corner
    uniform = torch.rand(3, n_clips, N_BLOCKS, generator=generator)
    shape = (uniform[0] * len(shapes)).long()                           # (B, M) which of the shapes
    free_rows, free_columns = ROWS - shapes[shape, 0], COLUMNS - shapes[shape, 1]
    row = (uniform[1] * (free_rows + 1)).long()      # I-JEPA's code omits the + 1, so its last row
    column = (uniform[2] * (free_columns + 1)).long()            # and column are never predicted
    hidden = (row * COLUMNS + column)[..., None] + offsets[shape]       # (B, M, K)
    # Every patch gets a random key below 1, the hidden ones get 2; the smallest keys are visible.
    keys = torch.rand(n_clips, N_PATCHES, generator=generator).scatter_(1, hidden.flatten(1), 2.0)
    n_visible = N_PATCHES - N_BLOCKS * offsets.shape[1]                 # C = 32
    return keys.topk(n_visible, largest=False).indices, hidden

def random_masks(n_clips, generator):
    """A random 60 % of the patches are hidden, and all of them predicted at once (M = 1). The paper
    draws the share anew for every batch; one share keeps the shapes.
    Returns: visible (B, C), hidden (B, 1, K), int64 patch indices."""
    n_hidden = round(HIDDEN_SHARE * N_PATCHES)
    order = torch.rand(n_clips, N_PATCHES, generator=generator).argsort(dim=1)
    return order[:, n_hidden:], order[:, None, :n_hidden]

def column_masks(n_clips, generator):
    """A random half of the columns is hidden in all rows, so whole moments must be predicted from
    other moments, and not from what sounds above and below them (M = 1).
    Returns: visible (B, C), hidden (B, 1, K), int64 patch indices."""
    columns = torch.rand(n_clips, 1, COLUMNS, generator=generator).argsort(dim=2)
    patches = torch.arange(ROWS)[:, None] * COLUMNS + columns           # (B, rows, columns)
    hidden, visible = patches.chunk(2, dim=2)
    return visible.flatten(1), hidden.flatten(1)[:, None]

MASKS = {"block": block_masks, "random": random_masks, "columns": column_masks}

def make_masks(kind, n_clips, seed, step):
    """The masks of one step, a pure function of (seed, step): visible (B, C), hidden (B, M, K)."""
    return MASKS[kind](n_clips, torch.Generator().manual_seed(seed * 1_000_003 + step))

def draw(spectrogram, visible, hidden, color):
    """One clip's spectrogram (F, T) under its masks (C,) and (M, K), as text, high bands on top. A
    patch is 2 lines of 4 characters, whose shades show the level. A digit marks a hidden patch with
    its block (the last, where blocks overlap), a dot one that is neither visible nor predicted.
    color: use a terminal's greys, which show the level under the marks, too."""
    marks = ["."] * N_PATCHES
    for mark, patches in zip(" 123456789", [visible, *hidden]):
        for patch in patches.tolist():
            marks[patch] = mark
    level = torch.nn.functional.avg_pool2d(spectrogram[None], (PATCH // 2, PATCH // 4))[0]
    level = ((level - level.min()) / (level.max() - level.min()) * 4).round().int().tolist()
    lines = []
    for y in reversed(range(2 * ROWS)):
        line = ""
        for x in range(4 * COLUMNS):
            mark, shade = marks[y // 2 * COLUMNS + x // 4], level[y][x]
            if color:
                line += f"\x1b[48;5;{234 + 4 * shade}m\x1b[1;33m{mark}\x1b[0m"
            else:
                line += " ░▒▓█"[shade] if mark == " " else mark
        lines.append(line)
    return "\n".join(lines)

if __name__ == "__main__":
    sound = next(BuiltInSounds().windows(20, hop_samples(1.28) * N_FRAMES))
    spectrogram = LogMel(1.28).log_mel(sound[None])[0]
    for kind in MASKS:
        visible, hidden = make_masks(kind, n_clips=1, seed=0, step=0)
        print(f"{kind} masks: {visible.shape[1]} of {N_PATCHES} patches visible; "
              f"{hidden.shape[1]} block(s) of {hidden.shape[2]} to predict, marked by digits; "
              "dots: neither")
        print(draw(spectrogram, visible[0], hidden[0], sys.stdout.isatty()), end="\n\n")
