"""Networks for 32 x 32 images that timm lacks, registered with timm.

``resnet8/20/32_cifar``: residual networks (arXiv 1512.03385, section 4.2) with 1x1 convolutions and batch norms on the
shortcuts that change shape, as used in arXiv 1912.13200.
``preact_resnet8/20/32/44/56/110``: pre-activation residual networks (arXiv 1603.05027) with 1x1 convolutions on
the shortcuts that change shape, taken after the shared pre-activation, and ``mobilenetv2_cifar``:
MobileNetV2 (arXiv 1801.04381) with strides removed for 32 x 32. As used in arXiv 2111.12273.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.models.entry_points import register

__all__ = ["CifarResNet", "MobileNetV2Cifar", "PreActResNet"]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _config(name: str, num_classes: int, classifier: str, first: str) -> dict[str, Any]:
    return {
        "architecture": name,
        "num_classes": num_classes,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "classifier": classifier,
        "first_conv": first,
    }


def _init_weights(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2.0 / fan_out))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.act2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, H / stride, W / stride] of ``x`` [B, in, H, W]."""
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(out + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet of ``depth`` = 6 n + 2 layers in three stages.

    Args:
        name: Entry point, for the configuration.
        depth: Number of layers.
        num_classes: Classes.
        width: Channels of the first stage; doubled at each following one.
        in_chans: Image channels.
        head_bias: Whether the classifier has a bias.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, name: str, depth: int, num_classes: int = 10, width: int = 16, in_chans: int = 3, head_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.default_cfg = self.pretrained_cfg = _config(name, num_classes, "fc", "conv1")
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        channels = width
        for k in range(3):
            out, blocks = width * 2**k, []
            for i in range((depth - 2) // 6):
                blocks.append(_Block(channels, out, 2 if k and not i else 1))
                channels = out
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes, bias=head_bias)
        _init_weights(self)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, 32, 32]."""
        x = self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))
        return self.fc(self.pool(x).flatten(1))


class _PreActBlock(nn.Module):
    """Two pre-activated 3x3 convolutions; ``shared`` takes the shortcut after the first activation."""

    def __init__(self, width_in: int, width_out: int, stride: int, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.bn1 = nn.BatchNorm2d(width_in)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        changes = stride != 1 or width_in != width_out
        self.downsample = nn.Conv2d(width_in, width_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, H / stride, W / stride] of ``x`` [B, in, H, W]."""
        active = self.act1(self.bn1(x))
        out = self.conv2(self.act2(self.bn2(self.conv1(active))))
        short = active if self.shared else x
        return out + (short if self.downsample is None else self.downsample(short))


class PreActResNet(nn.Module):
    """Pre-activation ResNet of ``depth`` = 6 n + 2 layers in three stages.

    Args:
        name: Entry point, for the configuration.
        depth: Number of layers.
        num_classes: Classes.
        width: Channels of the first stage; doubled at each following one.
        in_chans: Image channels.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, name: str, depth: int, num_classes: int = 10, width: int = 16, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.default_cfg = self.pretrained_cfg = _config(name, num_classes, "fc", "conv")
        self.conv = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        channels = width
        for k in range(3):
            out, blocks = width * 2**k, []
            for i in range((depth - 2) // 6):
                stride = 2 if k and not i else 1
                blocks.append(_PreActBlock(channels, out, stride, shared=i == 0))
                channels = out
            self.add_module(f"layer{k + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _init_weights(self)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, 32, 32]."""
        x = self.layer3(self.layer2(self.layer1(self.conv(x))))
        return self.fc(self.pool(self.act(self.bn(x))).flatten(1))


class _InvertedBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, width_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.adds = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if self.adds and width_in != width_out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out, H / stride, W / stride] of ``x`` [B, in, H, W]."""
        out = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.adds else out


class MobileNetV2Cifar(nn.Module):
    """MobileNetV2 for 32 x 32 images: stem and second stage keep the resolution.

    Args:
        name: Entry point, for the configuration.
        num_classes: Classes.
        in_chans: Image channels.
        stages: Expansion, channels, blocks and stride of the first block of every stage; default ``STAGES``.
        stem: Channels and stride of the first convolution.
        head: Channels that are pooled.
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(
        self,
        name: str,
        num_classes: int = 10,
        in_chans: int = 3,
        stages: Sequence[Sequence[int]] = STAGES,
        stem: Sequence[int] = (32, 1),
        head: int = 1280,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.default_cfg = self.pretrained_cfg = _config(name, num_classes, "fc", "conv1")
        channels, first_stride = stem
        self.conv1 = nn.Conv2d(in_chans, channels, 3, first_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        blocks = []
        for expansion, out, count, stride in stages:
            for i in range(count):
                blocks.append(_InvertedBlock(channels, out, expansion, stride if i == 0 else 1))
                channels = out
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.act2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(head, num_classes)
        _init_weights(self)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, 32, 32]."""
        x = self.layers(self.act1(self.bn1(self.conv1(x))))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))


for _depth in (8, 20, 32):
    register(f"resnet{_depth}_cifar", CifarResNet, depth=_depth)
for _depth in (8, 20, 32, 44, 56, 110):
    register(f"preact_resnet{_depth}", PreActResNet, depth=_depth)
register("mobilenetv2_cifar", MobileNetV2Cifar)
