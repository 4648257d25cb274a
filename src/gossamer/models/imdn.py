"""IMDN, a light network for super-resolution (arXiv 1909.11856), registered with timm as ``imdn_x2/x3/x4``.

Six blocks that keep a quarter of their channels at every step (information multi-distillation), weighted by contrast.
Keys are those of the published checkpoints (Zheng222/IMDN). Images in and out are RGB in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.models.super_resolution import SCALES, register_scales, sr_config
from gossamer.ops.sums import Add

__all__ = ["IMDN"]

_SLOPE = 0.05
_BLOCKS = 6


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class _ContrastAttention(nn.Module):
    """Weighs channels by the sum of their mean and standard deviation over the picture."""

    def __init__(self, width: int, reduction: int = 16) -> None:
        super().__init__()
        inner = width // reduction
        self.conv_du = nn.Sequential(nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W] of the same shape."""
        mean = x.mean((2, 3), keepdim=True)
        deviation = (x - mean).square().mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(deviation + mean)


class _Block(nn.Module):
    """Three convolutions that each put a quarter of their output aside, a fourth, and a mixture of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kept, self.passed = width // 4, width - width // 4
        self.c1 = nn.Conv2d(width, width, 3, padding=1)
        self.c2 = nn.Conv2d(self.passed, width, 3, padding=1)
        self.c3 = nn.Conv2d(self.passed, width, 3, padding=1)
        self.c4 = nn.Conv2d(self.passed, self.kept, 3, padding=1)
        self.c5 = nn.Conv2d(4 * self.kept, width, 1)
        self.cca = _ContrastAttention(4 * self.kept)
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W] of the same shape."""
        kept, rest = [], x
        for conv in (self.c1, self.c2, self.c3):
            aside, rest = torch.split(_leaky(conv(rest)), [self.kept, self.passed], 1)
            kept.append(aside)
        return self.add(self.c5(self.cca(torch.cat([*kept, self.c4(rest)], 1))), x)


class IMDN(nn.Module):
    """Information multi-distillation network.

    Args:
        name: Entry point, for the configuration.
        scale: 2, 3 or 4.
        width: Channels.
        img_size: Side of the image that cost, export and bench take.
    """

    def __init__(self, name: str, scale: int, width: int = 64, img_size: int = 64) -> None:
        super().__init__()
        self.default_cfg = self.pretrained_cfg = sr_config(name, scale, img_size)
        self.fea_conv = nn.Conv2d(3, width, 3, padding=1)
        for k in range(_BLOCKS):
            self.add_module(f"IMDB{k + 1}", _Block(width))
        self.c = nn.Sequential(nn.Conv2d(_BLOCKS * width, width, 1), nn.LeakyReLU(_SLOPE))
        self.LR_conv = nn.Conv2d(width, width, 3, padding=1)
        self.add = Add()
        self.upsampler = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, 3, H s, W s] of ``x`` [B, 3, H, W], both about [0, 1]."""
        first = self.fea_conv(x)
        outputs = [first]
        for k in range(_BLOCKS):
            outputs.append(getattr(self, f"IMDB{k + 1}")(outputs[-1]))
        return self.upsampler(self.add(self.LR_conv(self.c(torch.cat(outputs[1:], 1))), first))


register_scales("imdn", IMDN, SCALES)
