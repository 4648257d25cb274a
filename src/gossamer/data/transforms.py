"""From a picture to a model's input, through timm's transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from gossamer.core.errors import RecipeError, nearest
from gossamer.models.preprocessing import Preprocessing

__all__ = ["AUGMENT_OPTIONS", "Transform", "eval_transform", "train_transform"]

Transform = Callable[[Image.Image], Tensor]
"""RGB picture to float tensor [C, H, W]."""
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
        return self.then(image.convert("L"))


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


def eval_transform(pre: Preprocessing) -> Transform:
    """Return the deterministic transform that a model is evaluated with."""
    return _build(pre, False, {})


def train_transform(pre: Preprocessing, options: Mapping[str, Any] | None = None) -> Transform:
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
    return _build(pre, True, options)
