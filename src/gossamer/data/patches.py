"""Pairs of a low-resolution and a high-resolution patch, degraded on the fly from any photograph."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gossamer.data.images import UnfitPicture
from gossamer.data.resize import crop_to_multiple, imresize

__all__ = ["PatchPair", "degrade", "to_pixels", "to_tensor"]

_MARGIN = 4
"""Low-resolution pixels around a patch that are degraded with it: more than the kernel's reach of 2.5."""


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return uint8 pixels [H, W, C] as floats [C, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C")).float() / 255


def to_pixels(image: Tensor) -> np.ndarray:
    """Return floats [C, H, W] as uint8 pixels [H, W, C]; clipped to [0, 1], rounded half up."""
    return (image.clamp(0, 1) * 255 + 0.5).floor().byte().permute(1, 2, 0).cpu().numpy()


def degrade(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Return 8-bit ``pixels`` [H, W, C] shrunk by ``scale`` (MATLAB's bicubic); sides must be multiples of it."""
    return imresize(pixels, 1 / scale)


def _degraded_patch(pixels: np.ndarray, top: int, left: int, patch: int, scale: int) -> np.ndarray:
    """Return the patch [patch, patch, C] at low-resolution (top, left), as the degraded whole picture has it."""
    ends = [n // scale for n in pixels.shape[:2]]
    spans = [(max(0, a - _MARGIN), min(end, a + patch + _MARGIN)) for a, end in zip((top, left), ends, strict=True)]
    (y0, y1), (x0, x1) = spans
    small = degrade(pixels[y0 * scale : y1 * scale, x0 * scale : x1 * scale], scale)
    return small[top - y0 : top - y0 + patch, left - x0 : left - x0 + patch]


@dataclass(frozen=True)
class PatchPair:
    """Photograph to ``{"image": [3, p, p], "target": [3, p s, p s]}``, both in [0, 1].

    Attributes:
        scale: How much larger the target is.
        patch: Side of the low-resolution patch.
        anywhere: At a random place, with random flips and quarter turns (the global ``random`` decides, which
            loaders seed); else from the middle, and photographs that are too small are continued by mirroring.
    """

    scale: int
    patch: int
    anywhere: bool

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """Return the pair.

        Raises:
            UnfitPicture: The photograph is smaller than the scale, or than a patch that may lie anywhere.
        """
        pixels = crop_to_multiple(np.asarray(image), self.scale)
        if not min(pixels.shape[:2]):
            raise UnfitPicture(f"{image.width}x{image.height} pixels, smaller than the scale of {self.scale}")
        if not self.anywhere:
            lacking = [max(0, self.patch * self.scale - n) for n in pixels.shape[:2]]
            pixels = np.pad(pixels, [(0, lacking[0]), (0, lacking[1]), (0, 0)], mode="symmetric")
        room = [n // self.scale - self.patch for n in pixels.shape[:2]]
        if min(room) < 0:
            side = self.patch * self.scale
            raise UnfitPicture(
                f"{image.width}x{image.height} pixels, smaller than a patch of {side}x{side}; lower the task's patch"
            )
        top, left = (random.randint(0, r) if self.anywhere else r // 2 for r in room)
        low = _degraded_patch(pixels, top, left, self.patch, self.scale)
        y, x, side = top * self.scale, left * self.scale, self.patch * self.scale
        high = pixels[y : y + side, x : x + side]
        if self.anywhere:
            turns, flip = random.randrange(4), random.random() < 0.5
            low, high = (np.rot90(a[:, ::-1] if flip else a, turns) for a in (low, high))
        return {"image": to_tensor(low), "target": to_tensor(high)}
