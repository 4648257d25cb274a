"""Bicubic resizing as MATLAB's ``imresize``, the degradation of super-resolution benchmarks.

The cubic kernel has a = -0.5 (Keys 1981, IEEE TASSP 29, eq. 15) and, for shrinking, is stretched by the inverse scale
(antialiasing); rows come first. Of 8-bit input every pass is rounded (half up) and clipped. Beyond the border lies the
edge pixel: so the public test sets were made (Set5, Set14, BSD100, Urban100: equal pixel by pixel); newer releases of
MATLAB mirror. PIL and torch differ from it by more than a decibel in what networks trained on either make of it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from gossamer.core.errors import DataError

__all__ = ["BORDERS", "crop_to_multiple", "imresize"]

BORDERS = ("edge", "mirror")
"""What lies beyond the border: the edge pixel, or the picture mirrored at its edge (the edge pixel twice)."""

_WIDTH = 4.0
"""Support of the cubic kernel."""


def _cubic(x: np.ndarray) -> np.ndarray:
    a = np.abs(x)
    inner = 1.5 * a**3 - 2.5 * a**2 + 1
    outer = -0.5 * a**3 + 2.5 * a**2 - 4 * a + 2
    return np.where(a <= 1, inner, np.where(a <= 2, outer, 0.0))


@lru_cache(maxsize=64)
def _taps(length: int, out: int, scale: float, border: str) -> tuple[np.ndarray, np.ndarray]:
    """Return source indices [out, P] and weights [out, P] (rows sum to 1) of one axis."""
    stretch = min(scale, 1.0)
    width = _WIDTH / stretch
    at = np.arange(1, out + 1) / scale + 0.5 * (1 - 1 / scale)
    first = np.floor(at - width / 2)
    indices = first[:, None] + np.arange(math.ceil(width) + 2)
    weights = _cubic(stretch * (at[:, None] - indices))
    weights /= weights.sum(1, keepdims=True)
    source = indices.astype(np.int64) - 1
    if border == "mirror":
        source = np.concatenate([np.arange(length), np.arange(length)[::-1]])[source % (2 * length)]
    used = np.any(weights != 0, axis=0)
    return source.clip(0, length - 1)[:, used], weights[:, used]


def _along(pixels: np.ndarray, axis: int, scale: float, border: str) -> np.ndarray:
    """Resize the axis 0 or 1 of float64 pixels."""
    length = pixels.shape[axis]
    indices, weights = _taps(length, math.ceil(length * scale), scale, border)
    total = 0.0
    for k in range(indices.shape[1]):
        column = weights[:, k].reshape((-1,) + (1,) * (pixels.ndim - 1 - axis))
        total = total + column * np.take(pixels, indices[:, k], axis=axis)
    return np.asarray(total)


def imresize(pixels: np.ndarray, scale: float, border: str = "edge") -> np.ndarray:
    """Return ``pixels`` resized by ``scale``; a side n becomes ceil(n scale).

    Args:
        pixels: [H, W] or [H, W, C]; uint8, or floats of any range.
        scale: Above 0.
        border: One of ``BORDERS``.

    Returns:
        The same type: uint8 rounded and clipped after every pass, floats as they come (float64).

    Raises:
        DataError: Another type, shape or border, or a scale that is not above 0.
    """
    whole = pixels.dtype == np.uint8
    if pixels.ndim not in (2, 3) or not (whole or pixels.dtype.kind == "f") or not scale > 0 or border not in BORDERS:
        raise DataError(
            f"imresize: {pixels.dtype} {list(pixels.shape)} by {scale:g}, border {border!r}; expected uint8 or float "
            f"[H, W] or [H, W, C], a scale above 0 and one of {', '.join(BORDERS)}"
        )
    found = pixels.astype(np.float64)
    for axis in (0, 1):
        found = _along(found, axis, scale, border)
        if whole:
            found = np.floor(np.clip(found, 0, 255) + 0.5)
    return found.astype(np.uint8) if whole else found


def crop_to_multiple(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Return the top left part of ``pixels`` [H, W, ...] whose sides are multiples of ``scale``."""
    height, width = (n - n % scale for n in pixels.shape[:2])
    return pixels[:height, :width]
