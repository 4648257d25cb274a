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
from gossamer.recipe import Recipe

__all__ = ["compress"]

EVAL_SHARE = 0.2
"""Share of the images set aside for evaluation where no images are given for it."""


def _method(entry: Method | str | Mapping[str, Any], teacher: Any, target: Mapping[str, Any]) -> Method:
    """Build one method; hand the teacher and the budgets to fields of those names that are as by default."""
    if isinstance(entry, Method):
        method = entry
    elif isinstance(entry, str):
        method = build(entry, {})
    elif len(entry) == 1:
        name, options = next(iter(entry.items()))
        method = build(name, dict(options or {}))
    else:
        raise RecipeError(f"methods: got a mapping with keys {sorted(entry)}; expected one {{name: options}}")
    given = {k: v for k, v in {"teacher": teacher, **target}.items() if v is not None and k in ("teacher", *METRICS)}
    fields = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    spelt = set(next(iter(entry.values())) or {}) if isinstance(entry, Mapping) else set()
    wanted = {k: v for k, v in given.items() if k in fields and k not in spelt and getattr(method, k) == fields[k]}
    return dataclasses.replace(method, **wanted)  # type: ignore[type-var]


def compress(  # noqa: PLR0913 - mirrors the public call
    model: nn.Module | str, data: Any, methods: Sequence[Method | str | Mapping[str, Any]], *,
    target: Mapping[str, Any] | None, teacher: Any, evaluation: Any, train: Mapping[str, Any] | None,
    run_dir: Path, resume: bool, progress: bool,
) -> RunResult:  # fmt: skip
    """See ``gossamer.api.compress``."""
    bounds = dict(target or {})
    if not methods:
        raise RecipeError("methods: got none; name at least one, e.g. methods=[gossamer.DiffRate()]")
    built = [_method(m, teacher, bounds) for m in methods]
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
