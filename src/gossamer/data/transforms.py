"""From a picture to a model's input, through timm's transforms."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from gossamer.core.errors import RecipeError, nearest
from gossamer.models.preprocessing import Preprocessing

__all__ = ["AUGMENT_OPTIONS", "PictureTransform", "Rendering", "Transform", "eval_transform", "train_transform"]

Transform = Callable[[Image.Image], Tensor | dict[str, Tensor]]
"""RGB picture to float tensor [C, H, W], or to several tensors by their names in a batch (``image``, ``target``)."""
AUGMENT_OPTIONS = (
    "auto_augment",
    "color_jitter",
    "color_jitter_prob",
    "gaussian_blur_prob",
    "grayscale_prob",
    "hflip",
    "interpolation",
    "no_aug",
    "ratio",
    "re_count",
    "re_mode",
    "re_prob",
    "scale",
    "train_crop_mode",
    "vflip",
)
"""Options of timm's ``create_transform`` that a recipe may set."""


@dataclass(frozen=True)
class _Grey:
    """Makes the picture single-channel before the rest (models with one input channel)."""

    then: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        return self.then(image.convert("L"))  # type: ignore[return-value]


def _build(pre: Preprocessing, training: bool, options: Mapping[str, Any]) -> Transform:
    settings: dict[str, Any] = {
        "input_size": pre.size,
        "is_training": training,
        "interpolation": pre.interpolation,
        "mean": pre.mean,
        "std": pre.std,
        "crop_pct": pre.crop_pct,
        "crop_mode": pre.crop_mode,
        **options,
    }
    try:
        made = create_transform(**settings)
    except (TypeError, ValueError, AssertionError, KeyError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise RecipeError(f"augment {dict(options)}: {reason}; see timm.data.create_transform") from err
    return _Grey(made) if pre.size[0] == 1 else made


@dataclass(frozen=True)
class Rendering:
    """How pictures are made at a step, where that changes in the course of a training.

    Attributes:
        size: Side of the square input in pixels; ``None``: as the model asks. Pictures are cropped and
            resized straight to it.
        magnitude: Share of the recipe's RandAugment magnitude, in [0, 1]; rounded, and off at 0.
        erase: Share of the recipe's random-erasing probability, in [0, 1].
    """

    size: int | None = None
    magnitude: float = 1.0
    erase: float = 1.0


@dataclass
class PictureTransform:
    """Picture to input tensor, as the model asks or under another ``Rendering``.

    Attributes:
        pre: Size, mean, std and interpolation.
        training: Random (training) or deterministic (evaluation).
        options: ``AUGMENT_OPTIONS``.
    """

    pre: Preprocessing
    training: bool
    options: Mapping[str, Any]
    _made: dict[Rendering, Transform] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.at(Rendering())  # bad options show when the transform is made

    def __call__(self, image: Image.Image) -> Tensor:
        return self.at(Rendering())(image)  # type: ignore[return-value]

    def at(self, rendering: Rendering) -> Transform:
        """Return the transform under ``rendering``."""
        if rendering not in self._made:
            size = self.pre.size if rendering.size is None else (self.pre.size[0], rendering.size, rendering.size)
            options = _weakened(self.options, rendering)
            self._made[rendering] = _build(replace(self.pre, size=size), self.training, options)
        return self._made[rendering]


def _weakened(options: Mapping[str, Any], rendering: Rendering) -> dict[str, Any]:
    """Return augmentation options scaled by ``rendering``."""
    new = dict(options)
    policy = str(new.get("auto_augment") or "")
    found = re.search(r"-m(\d+(?:\.\d+)?)", policy)
    if found and rendering.magnitude < 1:
        level = round(max(0.0, float(found[1]) * rendering.magnitude))
        new["auto_augment"] = f"{policy[: found.start()]}-m{level}{policy[found.end() :]}" if level else None
    if "re_prob" in new:
        new["re_prob"] = float(new["re_prob"]) * rendering.erase
    return new


def eval_transform(pre: Preprocessing) -> PictureTransform:
    """Return the deterministic transform that a model is evaluated with."""
    return PictureTransform(pre, False, {})


def train_transform(pre: Preprocessing, options: Mapping[str, Any] | None = None) -> PictureTransform:
    """Return the random transform for training.

    Args:
        pre: Size, mean, std and interpolation.
        options: ``AUGMENT_OPTIONS``; default timm's random resized crop, flip and colour jitter.

    Raises:
        RecipeError: Unknown option (with the nearest right name) or a value timm refuses.
    """
    options = dict(options or {})
    for key in options:
        if key not in AUGMENT_OPTIONS or key not in inspect.signature(create_transform).parameters:
            raise RecipeError(
                f"augment option {key!r} is unknown; options are {', '.join(AUGMENT_OPTIONS)}"
                f"{nearest(key, AUGMENT_OPTIONS)}"
            )
    for key in ("scale", "ratio"):
        if isinstance(options.get(key), list):
            options[key] = tuple(options[key])
    return PictureTransform(pre, True, options)
