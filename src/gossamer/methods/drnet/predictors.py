"""The networks that look at a small copy of an image and choose its resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import RecipeError, nearest
from gossamer.models.source import create

__all__ = ["PREDICTORS", "Kind", "build_predictor", "kind_of", "reset"]

_Build = Callable[[int, int], nn.Module]


def _resnet10(choices: int, channels: int) -> nn.Module:
    """Return the published predictor: a residual network of one basic block a stage (4.907 M parameters)."""
    block: Any = BasicBlock  # timm's annotation takes an instance
    return ResNet(block, (1, 1, 1, 1), num_classes=choices, in_chans=channels, zero_init_last=False)


def _convolution(inputs: int, outputs: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(width: int, choices: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, choices)]


def _inverted(choices: int, channels: int) -> nn.Module:
    """Return one inverted residual block a stage (0.3 M parameters); the paper gives no details of its own."""
    widths = (16, 24, 40, 80, 160)
    layers = _convolution(channels, widths[0], 2)
    for narrow, wide in zip(widths, widths[1:], strict=False):
        layers.append(InvertedResidual(narrow, wide, stride=2, exp_ratio=6.0, act_layer=nn.ReLU6))
    layers += _convolution(widths[-1], 640, 1, kernel=1)
    return nn.Sequential(*layers, *_head(640, choices))


def _small(choices: int, channels: int) -> nn.Module:
    """Return three convolutions, for networks of a few ten million MACs."""
    widths = (12, 24, 48)
    layers = _convolution(channels, widths[0], 1) + _convolution(widths[0], widths[1], 2)
    return nn.Sequential(*layers, *_convolution(widths[1], widths[2], 2), *_head(widths[2], choices))


@dataclass(frozen=True)
class Kind:
    """A kind of predictor: how it is built from (choices, image channels), and its input over the network's own."""

    build: _Build
    share: float


PREDICTORS = {
    "resnet10": Kind(_resnet10, 128 / 224),
    "inverted": Kind(_inverted, 64 / 224),
    "small": Kind(_small, 0.5),
}
"""Predictors by name: published for ResNets, rebuilt for MobileNetV2, our own for small images."""


def kind_of(name: str) -> Kind:
    """Return a predictor by name; a timm model's name is one too.

    Raises:
        RecipeError: Neither.
    """
    if name in PREDICTORS:
        return PREDICTORS[name]

    def build(choices: int, channels: int) -> nn.Module:
        return create(name, {"in_chans": channels}, choices)

    import timm

    if not timm.is_model(name):
        hint = nearest(name, PREDICTORS)
        raise RecipeError(f"drnet: predictor {name!r}; allowed are {', '.join(PREDICTORS)} and timm models{hint}")
    return Kind(build, 128 / 224)


def build_predictor(name: str, choices: int, channels: int) -> nn.Module:
    """Return a predictor with fixed weights, the same at every call (``reset`` gives it random ones)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind_of(name).build(choices, channels)


@torch.no_grad()
def reset(predictor: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights anew: He initialisation by outputs, unit norms, as the release; other parameters stay.

    Args:
        predictor: The network, wherever it is.
        generator: CPU generator.
    """
    for module in predictor.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            std = (2.0 / (kernel * module.out_channels / module.groups)) ** 0.5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            module.weight.copy_((2 * torch.rand(module.weight.shape, generator=generator) - 1) * bound)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, _BatchNorm):
            module.reset_parameters()
