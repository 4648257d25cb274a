"""Nested state to JSON plus safetensors and back: no code is ever loaded.

Tensors become ``{"__tensor__": key}``, or ``{"__placed__": key}`` where they lay on an accelerator and
return to one; tuples, dictionaries with other than string keys and
non-finite floats are tagged in the same way, so that what is read equals what was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import StateError

__all__ = ["first_non_finite", "pack", "unpack"]

_TAGS = ("__tensor__", "__placed__", "__tuple__", "__items__", "__float__")


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists, tuples, tensors, numbers, strings and None.

    Returns:
        The JSON tree and its tensors (contiguous, on the CPU, none sharing memory).

    Raises:
        StateError: Something else is inside; names where.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def store(tensor: Tensor, path: str) -> dict[str, str]:
        data = tensor.detach().to("cpu").contiguous()
        pointer = data.untyped_storage().data_ptr()
        if pointer in seen or data.untyped_storage().nbytes() != data.numel() * data.element_size():
            data = data.clone()
        seen.add(data.untyped_storage().data_ptr())
        tensors[path] = data
        return {"__tensor__" if tensor.device.type == "cpu" else "__placed__": path}

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, Tensor):
            return store(item, path)
        if item is None or isinstance(item, bool | str):
            return item
        if isinstance(item, float):
            return item if math.isfinite(item) else {"__float__": repr(item)}
        if isinstance(item, int):
            return item
        if isinstance(item, Mapping):
            if all(isinstance(k, str) for k in item) and not any(k in _TAGS for k in item):
                return {k: walk(v, f"{path}.{k}") for k, v in item.items()}
            pairs = enumerate(item.items())
            return {"__items__": [[walk(k, f"{path}.{n}k"), walk(v, f"{path}.{n}v")] for n, (k, v) in pairs]}
        if isinstance(item, tuple):
            return {"__tuple__": [walk(v, f"{path}.{n}") for n, v in enumerate(item)]}
        if isinstance(item, list):
            return [walk(v, f"{path}.{n}") for n, v in enumerate(item)]
        raise StateError(
            f"state at {path}: got {type(item).__name__}; a checkpoint holds tensors, numbers, strings, None, "
            f"lists, tuples and dicts. Convert it in state_dict()"
        )

    return walk(value, "state"), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Any:
    """Undo ``pack``; tensors that lay on an accelerator go to ``device`` (default: the CPU)."""
    if isinstance(tree, list):
        return [unpack(v, tensors, device) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        tag, inner = next(iter(tree.items()))
        if tag == "__tensor__":
            return tensors[inner]
        if tag == "__placed__":
            return tensors[inner].to(device or "cpu")
        if tag == "__float__":
            return float(inner)
        if tag == "__tuple__":
            return tuple(unpack(v, tensors, device) for v in inner)
        if tag == "__items__":
            return {unpack(k, tensors, device): unpack(v, tensors, device) for k, v in inner}
    return {k: unpack(v, tensors, device) for k, v in tree.items()}


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a non-finite number, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
