"""The tasks by name; a recipe names one, else the model says what it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gossamer.core.errors import RecipeError, nearest
from gossamer.models.preprocessing import Preprocessing
from gossamer.tasks.task import Task

__all__ = ["TASKS", "build_task", "task_for"]

TASKS = {
    "classification": "gossamer.tasks.classification:Classification",
    "super_resolution": "gossamer.tasks.super_resolution:SuperResolution",
    "image_translation": "gossamer.tasks.image_translation:ImageTranslation",
}
"""Where each task's class is; imported on use."""


def build_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Return a task built from plain options.

    Raises:
        RecipeError: Unknown task or option (with the nearest right name), or a wrong type.
    """
    if name not in TASKS:
        raise RecipeError(f"task {name!r} is unknown; known are {', '.join(TASKS)}{nearest(name, TASKS)}")
    module, _, cls_name = TASKS[name].partition(":")
    cls: Any = getattr(import_module(module), cls_name)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in options or {}:
        if key not in known:
            listed = ", ".join(known)
            raise RecipeError(f"task {name}: option {key!r} is unknown; options are {listed}{nearest(key, known)}")
    try:
        return TypeAdapter(cls).validate_python(dict(options or {}))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "options"
        raise RecipeError(f"task {name}: {where}={first['input']!r}: {first['msg']}") from None


def task_for(pre: Preprocessing, asked: Mapping[str, Mapping[str, Any]] | None = None) -> Task:
    """Return the task asked for, or the one a model's preprocessing names.

    Where both name the same task, the model's options fill in what is not asked for.

    Raises:
        RecipeError: Unknown task or option.
    """
    own_name, own = next(iter(pre.task.items()))
    if not asked:
        return build_task(own_name, own)
    name, options = next(iter(asked.items()))
    return build_task(name, {**own, **options} if name == own_name else options)
