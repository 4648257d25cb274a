"""Likeness of pictures in the features of a frozen network: style and content (arXiv 1603.08155)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.kits.teacher import FeatureTap
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.models.store import is_saved
from gossamer.ops.adversarial import gram, wide_mean

__all__ = ["HOW", "PerceptualNetwork", "load_perceptual"]

LEVELS = 4
HOW = (
    "give VGG-16 as 'vgg16@vgg16.safetensors' (timm's or torchvision's ImageNet weights), or a stand-in such as "
    "'tf_efficientnet_lite0@weights.safetensors'"
)
"""How to name a perceptual network, for messages."""


class _Reached(Exception):  # noqa: N818 - a way out, not an error
    """The last module that counts has run."""


class _Trunk(nn.Module):
    """A timm model until its modules at ``paths`` have run: what comes after is not computed."""

    def __init__(self, net: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.net, self.paths = net, tuple(paths)

    def forward(self, x: Tensor) -> None:
        left = set(self.paths)

        def arrive(path: str, *_: object) -> None:
            left.discard(path)
            if not left:
                raise _Reached

        with ExitStack() as hooks:
            for path in self.paths:
                hooks.enter_context(self.net.get_submodule(path).register_forward_hook(partial(arrive, path)))
            hooks.enter_context(suppress(_Reached))
            self.net.forward_features(x)  # type: ignore[operator]


class PerceptualNetwork(nn.Module):
    """Features of pictures at a few depths of a frozen network.

    Args:
        net: A timm model (``forward_features``).
        paths: Module paths of the features, in forward order.
        normalise: Bring pictures to the network's own mean and std; otherwise they enter in [0, 1], as released.
        content: Which of ``paths`` the content term compares.

    Raises:
        ModelError: The network has no such modules.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, paths: Sequence[str], *, normalise: bool = False, content: int = 1) -> None:
        super().__init__()
        known = dict(net.named_modules())
        missing = [p for p in paths if p not in known]
        if missing or not paths or not hasattr(net, "forward_features"):
            raise ModelError(f"perceptual network {type(net).__name__}: no features at {missing or list(paths)}; {HOW}")
        self.trunk = _Trunk(net.eval().requires_grad_(False), paths)
        self.paths, self.content = tuple(f"net.{p}" for p in paths), min(content, len(paths) - 1)
        pre = preprocessing(net)
        mean, std = (pre.mean, pre.std) if normalise else ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return the features of pictures [B, 1 or 3, H, W] in [-1, 1], one tensor a depth."""
        if self.trunk.training:
            self.trunk.eval()
        rgb = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
        with FeatureTap(self.trunk, self.paths, training_only=False) as tap:
            self.trunk(((rgb + 1) / 2 - self.mean) / self.std)
            return list(tap.read().values())

    def terms(self, pictures: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return (style, content) of pictures [B, C, H, W] in [-1, 1] against ``goal``, which gets no gradient.

        Style is the sum over depths of the mean absolute difference of Gram matrices, content the mean absolute
        difference of the features at one depth (relu2_2 for VGG-16).
        """
        ours = self(pictures)
        with torch.no_grad():
            theirs = self(goal.detach())
        style = torch.stack(
            [F.l1_loss(gram(a.float()), gram(b.float())) for a, b in zip(ours, theirs, strict=True)]
        ).sum()
        return style, wide_mean((ours[self.content] - theirs[self.content]).abs())


def load_perceptual(
    spec: str | nn.Module | None,
    paths: Sequence[str] | None = None,
    *,
    normalise: bool = False,
    who: str = "method",
    how: str = HOW,
) -> PerceptualNetwork:
    """Return the perceptual network that ``spec`` names.

    Args:
        spec: A ``PerceptualNetwork``, a timm model, or a model spec with weights.
        paths: Modules whose outputs count; default the last before each of the first four halvings
            (``feature_info``), which for VGG-16 are relu1_2, relu2_2, relu3_3 and relu4_3.
        normalise: See ``PerceptualNetwork``.
        who: The method that asks, for messages.
        how: How to give a network or do without, for messages.

    Raises:
        RecipeError: No network, or one without weights; says how to give it.
        ModelError: The weights or the modules are not there.
    """
    if isinstance(spec, PerceptualNetwork):
        return spec
    if isinstance(spec, str) and ("@" in spec or is_saved(spec)):
        net = load_model(spec)
    elif isinstance(spec, nn.Module):
        net = spec
    else:
        raise RecipeError(f"{who}: perceptual={spec!r}: likeness of features needs a trained network; {how}")
    if paths is None:
        info = getattr(net, "feature_info", None) or []
        paths = [str(entry["module"]) for entry in list(info)[:LEVELS]]
    return PerceptualNetwork(net, paths, normalise=normalise)
