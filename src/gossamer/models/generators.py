"""Image-translation generators, registered with timm: ResNet, MobileResNet and U-Net.

``resnet_9blocks``, ``resnet_6blocks`` (CycleGAN, arXiv 1703.10593; Johnson et al., arXiv 1603.08155),
``mobile_resnet_9blocks``, ``mobile_resnet_6blocks`` (the same with depthwise separable blocks, as in GAN
Compression, arXiv 2003.08936), ``unet_256``, ``unet_128`` (pix2pix, arXiv 1611.07004). Modules sit where those
projects have them, so their checkpoints load. Images are in [-1, 1] (mean and std 0.5) on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.models.entry_points import register

__all__ = ["Generator", "ResNetGenerator", "UNetGenerator", "checkpoint_filter_fn", "norm_layer", "plain_init"]

NORMS = ("instance", "batch")
INIT_STD = 0.02


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Return a norm over [B, channels, H, W]: ``"instance"`` (per image, without parameters) or ``"batch"``.

    Raises:
        ModelError: Another kind.
    """
    if kind not in NORMS:
        raise ModelError(f"norm={kind!r}; allowed are {', '.join(NORMS)}")
    return nn.InstanceNorm2d(channels) if kind == "instance" else nn.BatchNorm2d(channels)


def plain_init(model: nn.Module) -> nn.Module:
    """Draw convolutions from N(0, 0.02) and scales of batch norms from N(1, 0.02), biases 0; in place."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(m.weight, 0.0, INIT_STD)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, INIT_STD)
        else:
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    return model


class UpConv(nn.ConvTranspose2d):
    """Transposed convolution that also knows what the literature says it costs.

    Papers on GAN compression count it at the resolution of its output (4 times too much at stride 2); the cost
    ledger lists that as theoretical MACs, beside those executed.
    """

    theoretical_macs: int | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return [B, out, s H, s W] of ``x`` [B, in, H, W]."""
        out = super().forward(x)
        if not torch.compiler.is_compiling():
            self.theoretical_macs = out.shape[-2] * out.shape[-1] * self.weight.numel()
        return out


class _Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution with a norm per image between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, groups=channels),
            nn.InstanceNorm2d(channels),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H - 2, W - 2] of ``x`` [B, C, H, W]."""
        return self.conv(x)


class _Residual(nn.Module):
    """``x + f(x)``, f being two 3x3 convolutions over mirrored borders."""

    def __init__(self, channels: int, norm: str, dropout: float, separable: bool) -> None:
        super().__init__()
        dense = partial(nn.Conv2d, channels, channels, 3, bias=norm == "instance")
        conv: Callable[[], nn.Module] = partial(_Separable, channels) if separable else dense
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), conv(), norm_layer(norm, channels), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.ReflectionPad2d(1), conv(), norm_layer(norm, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C, H, W] of ``x`` [B, C, H, W]."""
        return x + self.conv_block(x)


class Generator(nn.Module):
    """What the generators share: how they were built, how wide they are, where their features may be tapped.

    Attributes:
        options: The constructor's arguments.
        width: Channels of the first layer (``ngf``); everything else is a multiple of it.
        taps: Module paths of the features that methods compare, in forward order.
    """

    taps: tuple[str, ...] = ()

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.options = name, dict(options)
        self.width = int(options["width"])
        if self.width < 1:
            raise ModelError(f"{name}: width={self.width}; expected at least 1")
        size = options["img_size"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.default_cfg = self.pretrained_cfg = {
            "architecture": name, "task": {"image_translation": {}}, "input_size": (options["in_chans"], height, width),
            "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic",
            "mean": (0.5,) * options["in_chans"], "std": (0.5,) * options["in_chans"],
        }  # fmt: skip
        self.model = self._layers(**self.options)
        self.init_weights()

    def _layers(self, **options: Any) -> nn.Module:
        raise NotImplementedError

    def twin(self, **changes: Any) -> Generator:
        """Return a fresh generator built alike, but for ``changes`` of its options."""
        return type(self)(**{"name": self.name, **self.options, **changes})

    def init_weights(self) -> None:
        """Draw all weights anew (``plain_init``)."""
        plain_init(self)

    def set_width(self, width: int) -> Self:
        """Become ``width`` channels wide, with new random weights; in place.

        Raises:
            ModelError: Fewer than one channel.
        """
        if width < 1:
            raise ModelError(f"{type(self).__name__}: width={width}; expected at least 1")
        self.options["width"] = self.width = width
        device = next(self.parameters()).device
        self.model = self._layers(**self.options).to(device).train(self.training)
        self.init_weights()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures [B, out_chans, H, W] in [-1, 1] of pictures ``x`` [B, in_chans, H, W] in [-1, 1]."""
        return self.model(x)


class ResNetGenerator(Generator):
    """Two halvings, ``blocks`` residual blocks, two doublings; H and W must be multiples of 4.

    Args:
        name: Entry point, for the configuration.
        blocks: Residual blocks.
        separable: Depthwise separable blocks (MobileResNet).
        width: Channels of the first layer (ngf).
        in_chans: Channels of the pictures that come in.
        out_chans: Channels of those that go out.
        norm: ``"instance"`` or ``"batch"``.
        dropout: Share dropped inside each block in training, in [0, 1).
        img_size: Height and width that the pictures are prepared for; others work too.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the published networks
        self, name: str, blocks: int, separable: bool, width: int = 64, in_chans: int = 3, out_chans: int = 3,
        norm: str = "instance", dropout: float = 0.0, img_size: int | tuple[int, int] = 256,
    ) -> None:  # fmt: skip
        given = {"width": width, "in_chans": in_chans, "out_chans": out_chans, "norm": norm, "dropout": dropout}
        super().__init__(name, {**given, "img_size": img_size, "blocks": blocks, "separable": separable})
        first, third = 9, blocks // 3
        self.taps = tuple(f"model.{first + n}" for n in dict.fromkeys((0, third, 2 * third, blocks)))

    def _layers(self, **o: Any) -> nn.Module:
        w, norm, bias = o["width"], o["norm"], o["norm"] == "instance"
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(o["in_chans"], w, 7, bias=bias)]
        layers += [norm_layer(norm, w), nn.ReLU(inplace=True)]
        for c in (w, 2 * w):
            layers += [nn.Conv2d(c, 2 * c, 3, 2, 1, bias=bias), norm_layer(norm, 2 * c), nn.ReLU(inplace=True)]
        layers += [_Residual(4 * w, norm, o["dropout"], o["separable"]) for _ in range(o["blocks"])]
        for c in (2 * w, w):
            layers += [UpConv(2 * c, c, 3, 2, 1, 1, bias=bias), norm_layer(norm, c), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, o["out_chans"], 7), nn.Tanh())


class _Skip(nn.Module):
    """One level of a U-Net: halve, go deeper, double; the input is passed on beside the result."""

    def __init__(self, outer: int, inner: int, norm: str, inside: nn.Module | None, dropout: float) -> None:
        super().__init__()
        bias = norm == "instance"
        down: list[nn.Module] = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1, bias=bias)]
        deeper = [] if inside is None else [norm_layer(norm, inner), inside]
        up = UpConv(inner if inside is None else 2 * inner, outer, 4, 2, 1, bias=bias)
        end = [] if inside is None else [nn.Dropout(dropout)]
        self.model = nn.Sequential(*down, *deeper, nn.ReLU(), up, norm_layer(norm, outer), *end)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 2 C, H, W] of ``x`` [B, C, H, W]."""
        return torch.cat([x, self.model(x)], 1)


class _Outermost(nn.Module):
    def __init__(self, in_chans: int, out_chans: int, width: int, inside: nn.Module, bias: bool) -> None:
        super().__init__()
        down = nn.Conv2d(in_chans, width, 4, 2, 1, bias=bias)
        self.model = nn.Sequential(down, inside, nn.ReLU(), UpConv(2 * width, out_chans, 4, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out_chans, H, W] of ``x`` [B, in_chans, H, W]."""
        return self.model(x)


class UNetGenerator(Generator):
    """U-Net with ``depth`` halvings (at least 5); H and W must be multiples of 2^depth.

    Args:
        name: Entry point, for the configuration.
        depth: Halvings.
        width: Channels of the first layer (ngf).
        in_chans: Channels of the pictures that come in.
        out_chans: Channels of those that go out.
        norm: ``"instance"`` or ``"batch"`` (at one image a batch the two are alike, but for the parameters).
        dropout: Share dropped in the levels between the innermost and the fourth in training (pix2pix: 0.5).
        img_size: Height and width that the pictures are prepared for; default 2^depth.
    """

    LEVELS = (4, 2, 1)

    def __init__(  # noqa: PLR0913 - each is an option of the published networks
        self, name: str, depth: int, width: int = 64, in_chans: int = 3, out_chans: int = 3, norm: str = "instance",
        dropout: float = 0.0, img_size: int | tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        if depth < 5:
            raise ModelError(f"{name}: depth={depth}; expected at least 5 halvings")
        given = {"width": width, "in_chans": in_chans, "out_chans": out_chans, "norm": norm, "dropout": dropout}
        super().__init__(name, {**given, "img_size": img_size or 2**depth, "depth": depth})
        second, third = "model.model.1.model.3", "model.model.1.model.3.model.3"
        self.taps = (f"{second}.model.0", f"{third}.model.3.model.0", f"{third}.model.4", "model.model.1.model.4")

    def _layers(self, **o: Any) -> nn.Module:
        w, norm = o["width"], o["norm"]
        level: nn.Module = _Skip(8 * w, 8 * w, norm, None, 0.0)
        for _ in range(o["depth"] - 5):
            level = _Skip(8 * w, 8 * w, norm, level, o["dropout"])
        for k in self.LEVELS:
            level = _Skip(k * w, 2 * k * w, norm, level, 0.0)
        return _Outermost(o["in_chans"], o["out_chans"], w, level, norm == "instance")


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a CycleGAN or pix2pix checkpoint in our names.

    Blocks built without dropout have their second convolution one place earlier, and old files hold running
    statistics of instance norms, which never used them.
    """
    own = model.state_dict()
    moved = {k if k in own else k.replace("conv_block.5.", "conv_block.6."): v for k, v in state.items()}
    unused = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v for k, v in moved.items() if k in own or not k.endswith(unused)}


for _blocks in (9, 6):
    register(f"resnet_{_blocks}blocks", ResNetGenerator, drop=("num_classes",), blocks=_blocks, separable=False)
for _blocks in (9, 6, 3):  # three: for small pictures
    register(f"mobile_resnet_{_blocks}blocks", ResNetGenerator, drop=("num_classes",), blocks=_blocks, separable=True)
for _side, _halvings in ((256, 8), (128, 7), (32, 5)):
    register(f"unet_{_side}", UNetGenerator, drop=("num_classes",), depth=_halvings)
