"""PSNR and SSIM as papers on super-resolution report them: on the luma, borders cut."""

from __future__ import annotations

import math

import numpy as np

from gossamer.core.errors import DataError

__all__ = ["WINDOW", "cut_border", "luma", "psnr", "ssim"]

_RED, _GREEN, _BLUE = 65.481, 128.553, 24.966
WINDOW, _SIGMA = 11, 1.5


def luma(pixels: np.ndarray, *, whole: bool = False) -> np.ndarray:
    """Return Y of BT.601 in [16, 235] (MATLAB's ``rgb2ycbcr``), float64 [H, W].

    Args:
        pixels: uint8 [H, W, 3].
        whole: Round to whole numbers, as MATLAB does of 8-bit pictures.
    """
    y = 16 + (pixels.astype(np.float64) @ np.array([_RED, _GREEN, _BLUE])) / 255
    return np.floor(y + 0.5) if whole else y


def cut_border(a: np.ndarray, border: int) -> np.ndarray:
    """Return ``a`` [H, W, ...] without ``border`` pixels at each edge.

    Raises:
        DataError: Nothing would be left.
    """
    if min(a.shape[:2]) <= 2 * border:
        raise DataError(f"a picture of {a.shape[1]}x{a.shape[0]} pixels has nothing left inside borders of {border}")
    return a[border : a.shape[0] - border, border : a.shape[1] - border]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two pictures of range 0..255, dB; infinite for equal ones.

    Raises:
        DataError: Their shapes differ.
    """
    if a.shape != b.shape:
        raise DataError(f"psnr of pictures {list(a.shape)} and {list(b.shape)}; expected one shape")
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _blur(a: np.ndarray) -> np.ndarray:
    """Return the means [H - 10, W - 10] under a Gaussian window of 11 pixels and sigma 1.5."""
    at = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(at**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    height, width = (n - WINDOW + 1 for n in a.shape)
    rows = sum(k * a[i : i + height] for i, k in enumerate(kernel))
    return np.asarray(sum(k * rows[:, i : i + width] for i, k in enumerate(kernel)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean structural similarity of two planes [H, W] of range 0..255 (Wang et al. 2004, TIP 13, eq. 13).

    K1 = 0.01, K2 = 0.03, a Gaussian window of 11 pixels, sigma 1.5, whole windows only.

    Raises:
        DataError: Shapes differ, or are smaller than a window.
    """
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < WINDOW:
        raise DataError(f"ssim of planes {list(a.shape)} and {list(b.shape)}; expected one shape of at least 11 x 11")
    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    joint = _blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * joint + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
