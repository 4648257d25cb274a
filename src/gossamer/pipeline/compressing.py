"""From objects and flags to a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.core.method import Method
from gossamer.core.registry import build, name_of, options_of
from gossamer.cost.budget import METRICS
from gossamer.data.sources import from_dataset
from gossamer.pipeline.execute import RunResult, execute
from gossamer.pipeline.progress import say
from gossamer.pipeline.setup import refuse_shared
from gossamer.recipe import Recipe

__all__ = ["compress"]

EVAL_SHARE = 0.2
"""Share of the images set aside for evaluation where no images are given for it."""


def _methods(
    entries: Sequence[Method | str | Mapping[str, Any]], teacher: Any, target: Mapping[str, Any]
) -> list[Method]:
    """Build the methods; hand the teacher and the budgets to fields of those names that are as by default."""
    given = {k: v for k, v in {"teacher": teacher, **target}.items() if v is not None and k in ("teacher", *METRICS)}
    built = [(entry, _built(entry)) for entry in entries]
    taken = [_left_open(method, entry) & set(given) for entry, method in built]
    refuse_shared(target, [(name_of(method), keys) for (_, method), keys in zip(built, taken, strict=True)])
    return [
        dataclasses.replace(method, **{k: given[k] for k in keys})  # type: ignore[type-var]
        for (_, method), keys in zip(built, taken, strict=True)
    ]


def _built(entry: Method | str | Mapping[str, Any]) -> Method:
    if isinstance(entry, Method):
        return entry
    if isinstance(entry, str):
        return build(entry, {})
    if len(entry) == 1:
        name, options = next(iter(entry.items()))
        return build(name, dict(options or {}))
    raise RecipeError(f"methods: got a mapping with keys {sorted(entry)}; expected one {{name: options}}")


def _left_open(method: Method, entry: Method | str | Mapping[str, Any]) -> set[str]:
    spelt = set(next(iter(entry.values())) or {}) if isinstance(entry, Mapping) else set()
    fields = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    return {k for k, default in fields.items() if k not in spelt and getattr(method, k) == default}


def compress(  # noqa: PLR0913 - mirrors the public call
    model: nn.Module | str, data: Any, methods: Sequence[Method | str | Mapping[str, Any]], *,
    target: Mapping[str, Any] | None, teacher: Any, evaluation: Any, train: Mapping[str, Any] | None,
    task: str | Mapping[str, Mapping[str, Any]] | None, run_dir: Path, resume: bool, progress: bool,
) -> RunResult:  # fmt: skip
    """See ``gossamer.api.compress``."""
    bounds = dict(target or {})
    if not methods:
        raise RecipeError("methods: got none; name at least one, e.g. methods=[gossamer.DiffRate()]")
    built = _methods(methods, teacher, bounds)
    given = {"train": data, "eval": evaluation}  # specifications are read by the task, once the model is known
    sources = {k: from_dataset(v) for k, v in given.items() if v is not None and not isinstance(v, str)}
    spec = model if isinstance(model, str) else getattr(getattr(model, "gossamer_source", None), "name", "module")
    name, _, weights = spec.partition("@")
    recipe = Recipe.from_dict(
        {
            "name": run_dir.name,
            "model": {"name": name, "weights": weights or None},
            "data": {
                "train": data if isinstance(data, str) else None,
                "eval": evaluation if isinstance(evaluation, str) else None,
                "eval_share": EVAL_SHARE if evaluation is None else 0.0,
            },
            "task": task,
            "methods": [{name_of(m): options_of(m)} for m in built],
            "train": {"steps": 0, **dict(train or {})},
            "target": bounds or None,
        }
    )
    return execute(
        recipe, run_dir, resume=resume, progress=progress, model=None if isinstance(model, str) else model,
        methods=built, sources=sources,
        say=say if progress else (lambda text: None),
    )  # fmt: skip
