"""Networks for single-image super-resolution, registered with timm.

EDSR (arXiv 1707.02921): ``edsr_baseline_x2/x3/x4`` (16 blocks of 64 channels) and ``edsr_x2/x3/x4`` (32 of 256,
residuals times 0.1). SRResNet, the generator of SRGAN (arXiv 1609.04802): ``srresnet_x2/x3/x4`` (16 blocks of 64, batch
norms, PReLU), ``srgan_x4`` (5 blocks, the form of leftthomas/SRGAN), and ``Judge``, SRGAN's discriminator. Images in
and out are RGB in [0, 1]. Skip connections are modules (``ops.sums.Add``). Keys are those of the published EDSR;
``checkpoint_filter_fn`` also reads those of leftthomas/SRGAN's generator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.models.entry_points import register
from gossamer.ops.sums import Add

__all__ = ["EDSR", "Judge", "SRResNet", "checkpoint_filter_fn", "register_scales", "sr_config"]

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of DIV2K, subtracted by EDSR."""
SCALES = (2, 3, 4)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU}


def sr_config(name: str, scale: int, size: int) -> dict[str, Any]:
    """Return the timm configuration of a network for super-resolution, which states its task and scale.

    Raises:
        ModelError: A scale that is not in ``SCALES``.
    """
    if scale not in SCALES:
        raise ModelError(f"{name}: scale={scale}; allowed are {', '.join(map(str, SCALES))}")
    return {
        "architecture": name,
        "input_size": (3, size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "task": {"super_resolution": {"scale": scale}},
    }


def _conv(width_in: int, width_out: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=bias)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r}; allowed are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _upsampler(scale: int, width: int, bias: bool, act: str | None) -> nn.Sequential:
    """Return convolutions and pixel shuffles: one of factor 3, or one of factor 2 for each doubling."""
    parts: list[nn.Module] = []
    for factor in [3] if scale == 3 else [2] * int(math.log2(scale)):
        parts += [_conv(width, width * factor**2, bias=bias), nn.PixelShuffle(factor)]
        parts += [_activation(act)] if act else []
    return nn.Sequential(*parts)


class _Block(nn.Module):
    """EDSR's residual block: two convolutions without norms."""

    def __init__(self, width: int, act: str, residual_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), _activation(act), _conv(width, width))
        self.add = Add()
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W] of the same shape."""
        y = self.body(x)
        return self.add(y if self.residual_scale == 1 else y * self.residual_scale, x)


class EDSR(nn.Module):
    """Enhanced deep residual network for super-resolution.

    Args:
        name: Entry point, for the configuration.
        scale: 2, 3 or 4.
        depth: Residual blocks.
        width: Channels.
        act: ``"relu"`` or ``"prelu"`` (one slope a layer).
        residual_scale: Factor on each block's residual.
        value_range: Range that the layers compute in; checkpoints were trained at 255.
        img_size: Side of the image that cost, export and bench take.
    """

    mean: Tensor

    def __init__(  # noqa: PLR0913 - the numbers that make an EDSR
        self, name: str, scale: int, depth: int = 16, width: int = 64, act: str = "relu", residual_scale: float = 1.0,
        value_range: float = 255.0, img_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.default_cfg = self.pretrained_cfg = sr_config(name, scale, img_size)
        self.value_range = value_range
        self.register_buffer("mean", value_range * torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.head = nn.Sequential(_conv(3, width))
        self.body = nn.Sequential(*(_Block(width, act, residual_scale) for _ in range(depth)), _conv(width, width))
        self.add = Add()
        self.tail = nn.Sequential(_upsampler(scale, width, True, None), _conv(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, 3, H s, W s] of ``x`` [B, 3, H, W], both about [0, 1]."""
        x = self.head(x * self.value_range - self.mean)
        x = self.tail(self.add(self.body(x), x))
        return (x + self.mean) / self.value_range


class _NormedBlock(nn.Module):
    """SRResNet's residual block."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.prelu = _conv(width, width, bias=bias), nn.BatchNorm2d(width), nn.PReLU()
        self.conv2, self.bn2, self.add = _conv(width, width, bias=bias), nn.BatchNorm2d(width), Add()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W] of the same shape."""
        y = self.prelu(self.bn1(self.conv1(x)))
        return self.add(self.bn2(self.conv2(y)), x)


class SRResNet(nn.Module):
    """Generator of SRGAN, 9 x 9 convolutions at both ends.

    Args:
        name: Entry point, for the configuration.
        scale: 2, 3 or 4.
        depth: Residual blocks.
        width: Channels.
        bias: Convolutions have biases.
        last_norm: A batch norm (else a PReLU) behind the convolution that ends the body.
        squash: ``(tanh + 1) / 2`` at the output (leftthomas/SRGAN) instead of nothing.
        img_size: Side of the image that cost, export and bench take.
    """

    def __init__(  # noqa: PLR0913 - the numbers that make an SRResNet
        self, name: str, scale: int, depth: int = 16, width: int = 64, bias: bool = False, last_norm: bool = True,
        squash: bool = False, img_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.default_cfg = self.pretrained_cfg = sr_config(name, scale, img_size)
        self.squash = squash
        self.head = nn.Sequential(_conv(3, width, 9, bias), nn.PReLU())
        self.body = nn.Sequential(*(_NormedBlock(width, bias) for _ in range(depth)))
        self.middle = nn.Sequential(_conv(width, width, 3, bias), nn.BatchNorm2d(width) if last_norm else nn.PReLU())
        self.add = Add()
        self.upsampler = _upsampler(scale, width, bias, "prelu")
        self.tail = _conv(width, 3, 9, bias)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels)))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, 3, H s, W s] of ``x`` [B, 3, H, W], both about [0, 1]."""
        x = self.head(x)
        x = self.tail(self.upsampler(self.add(self.middle(self.body(x)), x)))
        return (torch.tanh(x) + 1) / 2 if self.squash else x


class Judge(nn.Module):
    """Discriminator of SRGAN for pictures of any size: eight convolutions, mean, two layers of one pixel.

    Args:
        width: Channels of the first layer.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv(3, width), nn.LeakyReLU(0.2)]
        channels = width
        for out, stride in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)):
            parts += [nn.Conv2d(channels, width * out, 3, stride, 1), nn.BatchNorm2d(width * out), nn.LeakyReLU(0.2)]
            channels = width * out
        parts += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2 * channels, 1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(2 * channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [B] of pictures [B, 3, H, W], without a final activation."""
        return self.layers(x).flatten()


# -- checkpoints -----------------------------------------------------------------------------------
def _from_leftthomas(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the names of ``SRResNet`` for those of leftthomas/SRGAN's generator."""
    last = max(int(k[len("block") : k.index(".")]) for k in state)
    rules: tuple[tuple[str, Any], ...] = (
        (r"block1\.", "head."),
        (rf"block{last}\.(\d)\.conv\.", lambda m: f"upsampler.{3 * int(m[1])}."),
        (rf"block{last}\.(\d)\.prelu\.", lambda m: f"upsampler.{3 * int(m[1]) + 2}."),
        (rf"block{last}\.\d\.", "tail."),
        (rf"block{last - 1}\.", "middle."),
        (r"block(\d+)\.", lambda m: f"body.{int(m[1]) - 2}."),
    )
    named = {}
    for key, value in state.items():
        pattern, new = next(rule for rule in rules if re.match(rule[0], key))
        named[re.sub(f"^{pattern}", new, key)] = value
    return named


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a published checkpoint in our names; EDSR's layers that shift the mean hold nothing of their own."""
    if all(k.startswith("block") for k in state):
        return _from_leftthomas(state)
    return {k: v for k, v in state.items() if not k.startswith(("sub_mean.", "add_mean."))}


# -- entry points ----------------------------------------------------------------------------------
def register_scales(name: str, kind: type[nn.Module], scales: Sequence[int], **fixed: Any) -> None:
    """Register ``name_x2`` and so on with timm: functions that make ``kind`` with a scale and ``fixed`` options."""
    for scale in scales:
        register(f"{name}_x{scale}", kind, scale=scale, **fixed)


register_scales("edsr_baseline", EDSR, SCALES)
register_scales("edsr", EDSR, SCALES, depth=32, width=256, residual_scale=0.1)
register_scales("srresnet", SRResNet, SCALES)
register_scales("srgan", SRResNet, (4,), depth=5, bias=True, last_norm=False, squash=True)
