"""Large pictures through a network in tiles: memory follows the tile, not the picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.core.errors import ModelError, RecipeError
from gossamer.data.patches import to_pixels, to_tensor
from gossamer.tasks.task import Predict

__all__ = ["OVERLAP", "WHOLE", "enlarge"]

OVERLAP = 16
"""Low-resolution pixels that neighbouring tiles share on each side (a quarter of a tile at most); what a tile makes of
them is thrown away."""
WHOLE = 512 * 512
"""Pictures of at most that many low-resolution pixels go through in one piece, where the model takes any size."""


def _starts(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start of the tile, first and last low-resolution pixel it decides) along one axis."""
    step = tile - 2 * overlap
    if length <= tile:
        yield 0, 0, length
        return
    kept = 0
    while kept < length:
        start = min(max(0, kept - overlap), length - tile)
        end = length if start + tile >= length else start + overlap + step
        yield start, kept, end
        kept = end


def enlarge(
    predict: Predict, pixels: np.ndarray, scale: int, *, tile: int | None = None, overlap: int | None = None
) -> np.ndarray:
    """Return ``pixels`` [H, W, 3] enlarged by a network, uint8 [H s, W s, 3].

    Inside a picture a tile sees ``overlap`` pixels more than it decides, so that its padding shows only through
    layers that reach further; pictures smaller than the only size a model takes are continued by their edge.

    Args:
        predict: The network: [1, 3, h, w] in [0, 1] to [1, 3, h s, w s].
        pixels: uint8.
        scale: Its scale.
        tile: Side of a tile; default: the size the model asks for, else one piece up to ``WHOLE`` pixels and 256 above.
        overlap: Default: see ``OVERLAP``.

    Raises:
        RecipeError: A tile that is not larger than its overlaps, or asked of a model that takes one size only.
        ModelError: The network enlarges by another factor.
    """
    height, width = pixels.shape[:2]
    if predict.size is not None:
        sides = predict.size[1:]
        if tile is not None:
            raise RecipeError(
                f"tile={tile}: the model takes {sides[0]}x{sides[1]} pixels and nothing else; leave tile out"
            )
    else:
        whole = tile is None and height * width <= WHOLE
        sides = (height, width) if whole else (tile or 256, tile or 256)
    overlap = min(OVERLAP, min(sides) // 4) if overlap is None else overlap
    for side, length in zip(sides, (height, width), strict=True):
        if side <= 2 * overlap and length > side:
            least = 2 * overlap + 1
            raise RecipeError(f"tile of {side} pixels with {overlap} shared on each side; expected at least {least}")
    out = np.empty((height * scale, width * scale, 3), np.uint8)
    for top, y0, y1 in _starts(height, sides[0], overlap):
        for left, x0, x1 in _starts(width, sides[1], overlap):
            piece = _padded(to_tensor(pixels[top : top + sides[0], left : left + sides[1]])[None], sides, predict)
            large = to_pixels(_checked(predict(piece), piece, scale)[0])
            ys, xs = slice((y0 - top) * scale, (y1 - top) * scale), slice((x0 - left) * scale, (x1 - left) * scale)
            out[y0 * scale : y1 * scale, x0 * scale : x1 * scale] = large[ys, xs]
    return out


def _padded(piece: Tensor, sides: tuple[int, ...], predict: Predict) -> Tensor:
    if predict.size is None or piece.shape[2:] == torch.Size(sides):
        return piece
    down, right = (side - n for side, n in zip(sides, piece.shape[2:], strict=True))
    return F.pad(piece, (0, right, 0, down), mode="replicate")


def _checked(large: Tensor, piece: Tensor, scale: int) -> Tensor:
    expected = (*piece.shape[:2], piece.shape[2] * scale, piece.shape[3] * scale)
    if tuple(large.shape) != expected:
        raise ModelError(
            f"the model makes {list(large.shape)} of {list(piece.shape)}; scale {scale} would be {list(expected)}. "
            f"Give the model's own scale"
        )
    return large
