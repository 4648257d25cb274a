"""Position embeddings on a grid, at another grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["resize_grid"]


def resize_grid(positions: Tensor, grid: tuple[int, int], *, antialias: bool = True, margin: float = 0.0) -> Tensor:
    """Return position embeddings [1, H, W, C], bicubically resized to ``grid``.

    Gradients reach ``positions``: it stays the one parameter at every grid.

    Args:
        positions: Embeddings at the model's own grid.
        grid: Rows and columns wanted.
        antialias: Low-pass before shrinking.
        margin: Added to the grid when the scale is computed. 0.1 is what DINO-style code does against
            rounding (changlin31/AutoProg, models/volo.py); it shifts the samples a little.
    """
    own = (positions.shape[1], positions.shape[2])
    if own == tuple(grid):
        return positions
    x = positions.permute(0, 3, 1, 2)
    if margin:
        scale = ((grid[0] + margin) / own[0], (grid[1] + margin) / own[1])
        x = F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        x = F.interpolate(x, size=grid, mode="bicubic", antialias=antialias)
    return x.permute(0, 2, 3, 1)
