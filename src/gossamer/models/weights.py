"""Reading safetensors weight files into models, with errors that say what does not fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["fill", "head_classes", "read_weights"]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".pickle")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SHOWN_KEYS = 3


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix.lower() in PICKLE_SUFFIXES or magic.startswith(PICKLE_MAGIC):
        target = path.with_suffix(".safetensors").name
        raise ModelError(
            f"weights {str(path)!r} are a pickle file, which can run code when loaded; only .safetensors is read. "
            f'If you trust the file, convert it: python -c "import torch, safetensors.torch as s; '
            f"d = torch.load('{path.name}', map_location='cpu', weights_only=True); "
            f"d = d.get('model', d.get('state_dict', d)); "
            f"s.save_file({{k: v.contiguous() for k, v in d.items()}}, '{target}')\""
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as stored.

    Raises:
        ModelError: No such file, a pickle file (never opened as one), or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"weights {str(path)!r}: no such file; expected a .safetensors file")
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as err:
        raise ModelError(
            f"weights {str(path)!r} are unreadable as safetensors ({err}); download or convert them again"
        ) from err


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the module paths of a timm model's classifiers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def head_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a checkpoint's classifier, or ``None`` if it has none."""
    for name in classifiers(model):
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim in (2, 4):
            return int(weight.shape[0])
    return None


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    own = model.state_dict()
    return {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in own],
        "other shape": [
            f"{k} {list(state[k].shape)} for {list(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint renamed and resampled as timm does for its own downloads."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), model))
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError, TypeError):
        return state  # not a checkpoint timm knows; the comparison below names what does not fit


def fill(model: nn.Module, state: dict[str, Tensor], where: str, *, new_head: bool = False) -> nn.Module:
    """Load a checkpoint into ``model`` in place; floating-point values are cast to the model's type.

    Args:
        model: A timm model.
        state: Tensors by key, in timm's names or one timm can convert.
        where: Name of the file, for messages.
        new_head: Leave the classifier as initialised where its shape differs.

    Raises:
        ModelError: Keys or shapes differ; lists the first of each kind.
    """
    if any(_differences(model, state).values()):
        state = _converted(model, state)
    if new_head:
        own = model.state_dict()
        heads = tuple(f"{name}." for name in classifiers(model))
        state = {k: v for k, v in state.items() if not (k.startswith(heads) and k in own and own[k].shape != v.shape)}
        kept = {k: v for k, v in own.items() if k.startswith(heads) and k not in state}
        state = {**state, **kept}
    wrong = {kind: keys for kind, keys in _differences(model, state).items() if keys}
    if wrong:
        text = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''}"
            for kind, keys in wrong.items()
        )
        arch = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        raise ModelError(
            f"weights {where} do not fit {arch}: {text}. Give the architecture the file was saved from, "
            f"as 'name@{where.strip(chr(39))}'"
        )
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    return model
