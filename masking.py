"""Chapter 2, masking: which patches the encoder sees and which the predictor must guess.

In: the kind of mask, how many clips, seed and step. Out: the indices of the visible patches (`context`) and of those to guess
(`targets`), row by row on the grid of 8 frequency rows x 16 time columns. No patch is ever in both.
Sources: multi-block masks, I-JEPA (arXiv 2301.08243), section 3; random masks, Audio-JEPA (arXiv 2507.02915), section 2.
Run `python masking.py` to see one of each. The letters B, N, C, M, K of the shapes are explained in model.py.
"""

import torch

ROWS, COLUMNS = 8, 16                 # the patch grid of one clip: frequency x time
N_PATCHES = ROWS * COLUMNS
N_BLOCKS = 4                          # M, target blocks a clip
BLOCK_SHAPES = ((3, 8), (4, 6))       # rows x columns: 24 patches, 19 % of the grid (I-JEPA: 15 to 20 %), that take 1.33 or
                                      # 0.75 times the share of the time axis that they take of the frequency axis
HIDDEN = 0.6                          # share of the patches that random masks hide


def block_masks(n_clips, generator):
    """Multi-block masks: four blocks to predict, each on its own, and a context outside all of them.

    Blocks hide whole events; a lone hidden patch could be filled in from its neighbours (I-JEPA, section 3; on audio, Riou et
    al., arXiv 2405.08679, found random masks better; our short runs no difference). Blocks may overlap. Four that do not still
    leave 32 of the 128 patches, so the context is always 32, drawn evenly from all that are left.
    I-JEPA draws a new area at every step. One area in several shapes keeps the variety, and every tensor its shape, so
    nothing recompiles.

    Returns: context (B, C), targets (B, M, K), int64 patch indices.
    """
    shapes = torch.tensor(BLOCK_SHAPES)                                             # (n_shapes, 2)
    offsets = torch.stack([                                                         # (n_shapes, K): patches from its corner on
        (torch.arange(h)[:, None] * COLUMNS + torch.arange(w)).flatten() for h, w in BLOCK_SHAPES])

    uniform = torch.rand(3, n_clips, N_BLOCKS, generator=generator)
    which = (uniform[0] * len(shapes)).long()                                       # (B, M) of the shapes
    free_rows, free_columns = ROWS - shapes[which, 0], COLUMNS - shapes[which, 1]
    row = (uniform[1] * (free_rows + 1)).long()                                     # I-JEPA omits the + 1: its last row and
    column = (uniform[2] * (free_columns + 1)).long()                               # column are never targets
    targets = (row * COLUMNS + column)[..., None] + offsets[which]                  # (B, M, K)

    # Every patch gets a random key below 1, hidden ones get 2: the smallest keys are a random choice of what is left.
    keys = torch.rand(n_clips, N_PATCHES, generator=generator).scatter_(1, targets.flatten(1), 2.0)
    n_context = N_PATCHES - N_BLOCKS * offsets.shape[1]                             # C = 32
    return keys.topk(n_context, largest=False).indices, targets


def random_masks(n_clips, generator):
    """Unstructured masks: a random 60 % of the patches are hidden and predicted in one go (M = 1).

    The paper draws 40 to 60 % anew for every batch; we keep one share, so the shapes never change. The share is that of
    Riou et al. (arXiv 2405.08679).

    Returns: context (B, C), targets (B, 1, K), int64 patch indices.
    """
    n_target = round(HIDDEN * N_PATCHES)
    order = torch.rand(n_clips, N_PATCHES, generator=generator).argsort(dim=1)
    return order[:, n_target:], order[:, None, :n_target]


MASKS = {"block": block_masks, "random": random_masks}


def make_masks(kind, n_clips, seed, step):
    """The masks of one step, a pure function of (seed, step): context (B, C), targets (B, M, K). kind: one of MASKS."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return MASKS[kind](n_clips, generator)


def draw(context, targets):
    """One clip's masks as text, high frequencies on top: `#` visible, 1-4 hidden (the last block drawn), `.` neither."""
    cells = ["."] * N_PATCHES
    for symbol, patches in zip("#123456789", [context, *targets]):
        for patch in patches.tolist():
            cells[patch] = symbol
    rows = [" ".join(cells[r * COLUMNS:(r + 1) * COLUMNS]) for r in range(ROWS)]
    return "\n".join(reversed(rows))


if __name__ == "__main__":
    for kind in MASKS:
        context, targets = make_masks(kind, n_clips=1, seed=0, step=0)
        print(f"{kind}: {context.shape[1]} of {N_PATCHES} patches visible, {targets.shape[1]} target block(s) "
              f"of {targets.shape[2]} patches (# visible, digits hidden, . not used; time goes right, pitch up)")
        print(draw(context[0], targets[0]), end="\n\n")
