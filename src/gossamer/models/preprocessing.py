"""What has to happen to a picture before a model sees it; travels with every model and artefact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from gossamer.core.errors import ModelError, nearest

__all__ = ["DEFAULT_TASK", "Preprocessing", "preprocessing"]

DEFAULT_TASK = "classification"
"""Task of a model that names none."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise.

    Attributes:
        size: (channels, height, width) of the model's input.
        mean: Per-channel mean subtracted from values in [0, 1].
        std: Per-channel divisor.
        interpolation: ``"bicubic"``, ``"bilinear"``, ``"nearest"`` or ``"lanczos"``.
        crop_pct: Side of the centre crop over the side of the resized picture, in (0, 1].
        crop_mode: timm's crop mode: ``"center"``, ``"squash"`` or ``"border"``.
        task: What the model is for, ``{name: options}`` as in a recipe (``tasks.registry``).
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    task: dict[str, dict[str, Any]] = field(default_factory=lambda: {DEFAULT_TASK: {}}, hash=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; the usual task is left out, so that older releases can read it."""
        plain = asdict(self)
        if self.task == {DEFAULT_TASK: {}}:
            del plain["task"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from ``to_json``.

        Raises:
            ModelError: An unknown key.
        """
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                hint = nearest(key, known)
                raise ModelError(f"preprocessing key {key!r} is unknown; known are {sorted(known)}{hint}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()}
        return cls(**plain)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def preprocessing(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a model.

    It is the one stored on a model that gossamer built or loaded; else that of timm's
    ``pretrained_cfg``, with the input size the model was really built for; else ImageNet's.
    """
    source = getattr(model, "gossamer_source", None)
    if source is not None and source.preprocessing is not None:
        return source.preprocessing
    cfg = getattr(model, "pretrained_cfg", None) or {}
    default = Preprocessing()
    channels, height, width = cfg.get("input_size") or default.size
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:
        height, width = _pair(built_for)
    mean, std = tuple(cfg.get("mean") or default.mean), tuple(cfg.get("std") or default.std)
    first = _first_channels(model, cfg)
    if first is not None and first != channels:
        channels = first
        mean, std = _per_channel(mean, first), _per_channel(std, first)
    return Preprocessing(
        size=(int(channels), int(height), int(width)),
        mean=mean,
        std=std,
        interpolation=cfg.get("interpolation") or default.interpolation,
        crop_pct=float(cfg.get("crop_pct") or default.crop_pct),
        crop_mode=cfg.get("crop_mode") or default.crop_mode,
        task=dict(cfg.get("task") or default.task),
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return (sum(values) / len(values),) * channels


def _first_channels(model: nn.Module, cfg: Mapping[str, Any]) -> int | None:
    """Return the input channels of the model's first convolution, where timm names it."""
    name = cfg.get("first_conv")
    name = name[0] if isinstance(name, list | tuple) and name else name
    modules = dict(model.named_modules())
    return getattr(modules.get(name or ""), "in_channels", None)
