"""Saved models: ``model.json`` (how to build it: timm name and edits) and ``model.safetensors``.

A saved model is rebuilt without any training code: the architecture comes from timm, each lasting
edit is applied by the method that made it, then the tensors are read. Weights of deployed layers below
8 bits are packed: they take their true width on disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core import registry
from gossamer.core.errors import ModelError, RunError, StateError
from gossamer.core.stack import Stack
from gossamer.models.source import ModelSource, attach, create, source_of
from gossamer.models.weights import read_weights
from gossamer.ops.grids import LayerGrids, pack_codes, unpack_codes
from gossamer.ops.int8 import Int8Conv2d, Int8Linear

__all__ = ["FORMAT", "VERSION", "is_saved", "load", "require_disk", "save"]

FORMAT = "gossamer-model"
VERSION = 2
"""Newest format read. 2 has packed weights; a model without any is written as 1, which older releases read."""
DESCRIPTION, TENSORS = "model.json", "model.safetensors"
_WHOLE = 8


def is_saved(path: str | Path) -> bool:
    """Return whether ``path`` is a folder written by ``save``."""
    return (Path(path) / DESCRIPTION).is_file()


def require_disk(path: str | Path, needed: int) -> None:
    """Check that ``needed`` bytes fit on the disk that ``path`` (which need not exist) is on.

    Raises:
        RunError: Not enough room; says how much is free.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{str(path)!r} needs {needed / 2**20:.0f} MiB of disk, {free / 2**20:.0f} MiB are free; "
            f"free some or choose another folder"
        )


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors with memory of their own and aliases of them."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, aliases


def _narrow_layers(model: nn.Module) -> dict[str, LayerGrids]:
    """Return the grids of the tensors to pack, by key of the state dict."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear | Int8Conv2d)}
    return {f"{n}.weight" if n else "weight": m.grids for n, m in layers.items() if m.grids.weight_bits < _WHOLE}


def _unpack(model: nn.Module, state: dict[str, Tensor], packed: Iterable[str], where: str) -> None:
    """Replace the packed tensors of ``state`` by the codes they hold."""
    own, grids = model.state_dict(), _narrow_layers(model)
    for name in packed:
        if name not in grids or name not in state:
            raise StateError(f"{where}: no layer for the packed {name!r}; the folder is damaged")
        try:
            state[name] = unpack_codes(state[name], own[name].shape, grids[name])
        except ModelError as err:
            raise StateError(f"{where}: {name!r}: {err}; the folder is damaged") from err


def _storable(method: Any) -> dict[str, Any]:
    """Return a method's options without those that JSON cannot hold (teachers and other modules)."""
    options = registry.options_of(method)
    return {k: v for k, v in options.items() if v != f"<{type(getattr(method, k)).__name__}>"}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    stack: Stack | None = None,
    source: ModelSource | None = None,
) -> Path:
    """Write ``model`` to folder ``path`` so that ``load`` rebuilds it; returns the folder.

    Args:
        model: The model, finished or plain.
        path: Folder; made if missing, an earlier model in it is replaced.
        stack: The stack that changed the model; its lasting edits are saved.
        source: How the model was built before the stack changed it; default what the model says
            (``source_of``).

    Raises:
        ModelError: The model cannot be rebuilt from its source, or something has changed it since and no stack says
            what.
        RunError: Not enough disk.
    """
    unsaid = stack is None and source is None
    source = source or source_of(model)
    if unsaid:
        _check_unchanged(model, source)
    edits: list[list[Any]] = []
    if stack is not None:
        edits = [
            [registry.name_of(stack.methods[i]), _storable(stack.methods[i]), edit] for i, edit in stack.lasting_edits()
        ]
    source = dataclasses.replace(source, edits=[*source.edits, *edits])
    tensors, aliases = _distinct(dict(model.state_dict()))
    narrow = {name: grids for name, grids in _narrow_layers(model).items() if name in tensors}
    tensors |= {name: pack_codes(tensors[name], grids) for name, grids in narrow.items()}
    folder = Path(path)
    require_disk(folder, sum(t.numel() * t.element_size() for t in tensors.values()) + 2**20)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "version": VERSION if narrow else 1,
        "gossamer": metadata.version("gossamer"),
        "source": source.to_json(),
        "shared": aliases,
        "packed": sorted(narrow),
    }
    (folder / DESCRIPTION).unlink(missing_ok=True)  # a folder without it is no model, whatever happens next
    part = folder / f".{TENSORS}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, folder / TENSORS)
    part = folder / f".{DESCRIPTION}.part"
    part.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / DESCRIPTION)
    return folder


def _rebuilt(source: ModelSource, steps: Iterable[Sequence[Any]]) -> nn.Module:
    """Return the model that ``source`` names, changed by ``steps`` (method, options, edit), with random weights."""
    model = create(source.name, source.kwargs, source.num_classes)
    for method, options, edit in steps:
        model = registry.build(method, options).apply(model, edit)
    return model


def _check_unchanged(model: nn.Module, source: ModelSource) -> None:
    own, again = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, _rebuilt(source, source.edits)))
    odd = sorted(k for k in own.keys() | again.keys() if own.get(k) != again.get(k))
    if odd:
        raise ModelError(
            f"{type(model).__name__} has changed since {source.name!r} was built ({', '.join(odd[:3])}), and could not "
            f"be loaded again; pass the stack that changed it (stack=...), or keep its state_dict yourself"
        )


def _describe(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        raise StateError(f"{str(folder)!r} holds no {DESCRIPTION}; expected a folder written by gossamer.save")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise StateError(f"{str(file)!r} is damaged ({err}); save the model again") from err
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("version"), int):
        raise StateError(f"{str(file)!r} is not a gossamer model (no format {FORMAT!r} with a version)")
    if data["version"] > VERSION:
        raise StateError(
            f"{str(file)!r} has format version {data['version']} (written by gossamer {data.get('gossamer')}); "
            f"this gossamer reads up to {VERSION}. Upgrade gossamer"
        )
    return data


def _load_tensors(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [
        f"{k} {list(state[k].shape)} {state[k].dtype} for {list(v.shape)} {v.dtype}"
        for k, v in own.items()
        if k in state and (state[k].shape != v.shape or (state[k].dtype != v.dtype and not _both_float(state[k], v)))
    ]
    if missing or unexpected or other:
        raise StateError(
            f"{where}: tensors do not fit the rebuilt model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shape or type {other[:3]}; the folder is damaged or was saved without its stack"
        )
    model.load_state_dict(state)


def _both_float(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and b.is_floating_point()


def load(path: str | Path) -> nn.Module:
    """Return the model saved in folder ``path``, on the CPU, in evaluation mode.

    Raises:
        StateError: Not a saved model, damaged, or written by a newer gossamer.
        RecipeError: A method of its edits is not installed.
    """
    folder = Path(path)
    data = _describe(folder)
    try:
        source = ModelSource.from_json(data["source"])
        steps = [(str(method), dict(options), dict(edit)) for method, options, edit in source.edits]
    except (KeyError, TypeError, ValueError) as err:
        raise StateError(f"{str(folder / DESCRIPTION)!r} is damaged ({err!r}); save the model again") from err
    model = _rebuilt(source, steps)
    try:
        state = read_weights(folder / TENSORS)
    except ModelError as err:
        raise StateError(f"saved model {str(folder)!r}: {err}") from err
    _unpack(model, state, data.get("packed") or (), repr(str(folder)))
    for alias, kept in (data.get("shared") or {}).items():
        if kept in state:
            state[alias] = state[kept]
    _load_tensors(model, state, repr(str(folder)))
    return attach(model, source).eval()
