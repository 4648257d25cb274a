"""How to build a model again: a timm name, options, and the edits of the methods that changed it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

import gossamer.models.widths  # noqa: F401 - registers its models with timm
from gossamer.core.errors import ModelError, nearest
from gossamer.models import (  # noqa: F401 - they register their networks with timm
    cifar_nets,
    generators,
    imdn,
    super_resolution,
)
from gossamer.models.preprocessing import Preprocessing, preprocessing

__all__ = ["ModelSource", "attach", "create", "inherit", "source_of"]

LOCAL_ONLY = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""timm options that name files or the network; a saved model must not depend on them."""


@dataclass(frozen=True)
class ModelSource:
    """The recipe of a model, as plain JSON.

    Attributes:
        name: timm model name.
        kwargs: Further options of ``timm.create_model``.
        num_classes: Outputs of the classifier.
        edits: ``[method name, method options, edit]`` in the order of application.
        preprocessing: What the model expects of its input.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    edits: list[list[Any]] = field(default_factory=list)
    preprocessing: Preprocessing | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "name": self.name,
            "kwargs": json.loads(json.dumps(self.kwargs)),
            "num_classes": self.num_classes,
            "edits": json.loads(json.dumps(self.edits)),
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSource:
        """Rebuild from ``to_json``."""
        pre = data.get("preprocessing")
        return cls(
            name=data["name"],
            kwargs=dict(data.get("kwargs") or {}),
            num_classes=data.get("num_classes"),
            edits=[list(e) for e in data.get("edits") or []],
            preprocessing=Preprocessing.from_json(pre) if pre else None,
        )


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    base = name.partition(".")[0]
    raise ModelError(f"model {name!r} is unknown to timm {timm.__version__}{nearest(base, timm.list_models())}")


def create(name: str, kwargs: Mapping[str, Any], num_classes: int | None) -> nn.Module:
    """Return a freshly initialised timm model that carries its ``gossamer_source``.

    Raises:
        ModelError: Unknown name (with the nearest right one), pretrained tag or option.
    """
    _check_name(name)
    for key in kwargs:
        if key in LOCAL_ONLY:
            raise ModelError(f"model option {key!r} is not allowed; name weights as '{name}@weights.safetensors'")
    options = dict(kwargs)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        kept = json.loads(json.dumps(dict(kwargs)))
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as err:
        raise ModelError(f"model {name!r} with options {options}: {_first_line(err)}") from err
    return attach(model, ModelSource(name, kept, getattr(model, "num_classes", num_classes)))


def attach(model: nn.Module, source: ModelSource) -> nn.Module:
    """Put ``source`` on ``model``, its preprocessing filled in, and return the model."""
    if source.preprocessing is None:
        source = dataclasses.replace(source, preprocessing=preprocessing(model))
    model.gossamer_source = source  # type: ignore[assignment]
    return model


def inherit(new: nn.Module, old: nn.Module) -> nn.Module:
    """Let ``new``, which takes the place of ``old``, say what that said of itself; returns ``new``.

    How it was built, its input, its number of classes: whatever of it ``old`` has.
    """
    for name in ("gossamer_source", "pretrained_cfg", "default_cfg", "num_classes"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    return new


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def source_of(model: nn.Module) -> ModelSource:
    """Return how to build ``model`` again; call it before any method changes the model.

    A model from ``load_model`` or ``load`` knows. For one from ``timm.create_model`` the name is
    in its ``pretrained_cfg``; the guess is checked by building it and comparing shapes.

    Raises:
        ModelError: The model cannot be rebuilt from a timm name; says how to give it a source.
    """
    known = getattr(model, "gossamer_source", None)
    if known is not None:
        return known
    remedy = "build it with load_model(name, **options), or register its function with timm.models.register_model"
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if not name or not timm.is_model(name):
        raise ModelError(f"{type(model).__name__} does not say how it was built (no timm architecture name); {remedy}")
    if cfg.get("tag"):
        name = f"{name}.{cfg['tag']}"
    pre = preprocessing(model)
    first: ModelError | None = None
    for kwargs in _guesses(pre, cfg):
        try:
            again = create(name, kwargs, getattr(model, "num_classes", None))
        except ModelError as err:
            first = first or err
            continue
        if _shapes(again) == _shapes(model):
            return ModelSource(name, kwargs, getattr(model, "num_classes", None), [], pre)
    raise ModelError(
        f"{type(model).__name__}: a plain timm {name!r} has other parameters, so the options it was built with "
        f"are unknown{f' ({first})' if first else ''}; {remedy}"
    )


def _guesses(pre: Preprocessing, cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    usual = tuple(cfg.get("input_size") or pre.size)
    changed: dict[str, Any] = {}
    if pre.size[1:] != usual[1:]:
        changed["img_size"] = pre.size[1] if pre.size[1] == pre.size[2] else list(pre.size[1:])
    if pre.size[0] != usual[0]:
        changed["in_chans"] = pre.size[0]
    return [changed, {}] if changed else [{}]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
