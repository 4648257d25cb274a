"""Checks of a room: its files, its card, its recipes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import as_file
from typing import Any

import numpy as np
import yaml
from PIL import Image

from gossamer.conformance.running import require
from gossamer.core import registry
from gossamer.data.images import ImageSource
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.engine.planning import describe_plan
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

__all__ = ["ROOM_CHECKS", "check_card", "check_files", "check_paper_recipe", "check_recipe"]

FILES = ("__init__.py", "method.py", "example.py", "card.md", "recipe.yaml", "paper.yaml", "figures.toml")
FIGURE_KEYS = {"name", "value", "tolerance", "source", "check"}
FIGURE_CHECKS = {"exact", "short", "run"}
STATUS = {"reproduced", "mathematics checked", "reconstruction", "baseline"}
STEPS = 3
PICTURES = 32


def check_files(room: str) -> None:
    """The room holds every file that a room has, and its figures are complete and named once."""
    folder = registry.room(room)
    missing = [f for f in (*FILES, f"test_{room}.py") if not folder.joinpath(f).is_file()]
    require(not missing, f"room {room} lacks {missing}")
    names = []
    for figure in tomllib.loads(folder.joinpath("figures.toml").read_text(encoding="utf-8")).get("figure", []):
        lacking = FIGURE_KEYS - figure.keys()
        require(not lacking, f"room {room}: figure {figure.get('name')!r} lacks {sorted(lacking)}")
        require(
            figure["check"] in FIGURE_CHECKS, f"room {room}: figure {figure['name']!r} has check {figure['check']!r}"
        )
        names.append(figure["name"])
    twice = sorted({n for n in names if names.count(n) > 1})
    require(not twice, f"room {room}: figures {twice} are there twice")


def check_card(room: str) -> None:
    """The card's front matter states what the class declares, and offers options that the class takes."""
    entry, cls = registry.info(room), registry.find(room)
    require(entry.cls == cls.__name__, f"room {room}: card names class {entry.cls}, the room exports {cls.__name__}")
    require(entry.stage == cls.stage, f"room {room}: card says stage {entry.stage}, the class {cls.stage}")
    require(
        set(entry.touches) == set(cls.touches),
        f"room {room}: card says touches {sorted(entry.touches)}, the class {sorted(cls.touches)}",
    )
    require(entry.status in STATUS, f"room {room}: status {entry.status!r}; allowed are {sorted(STATUS)}")
    for options in entry.default_for.values():
        registry.build(room, options)
    require(len(registry.card(room)) > 500, f"room {room}: the card says almost nothing")


def _read(room: str, name: str) -> Recipe:
    with as_file(registry.room(room).joinpath(name)) as path:
        return Recipe.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), name)


def check_paper_recipe(room: str) -> None:
    """The published setting is a valid recipe that uses the method."""
    recipe = _read(room, "paper.yaml")
    require(any(room in entry for entry in recipe.methods), f"room {room}: paper.yaml does not use {room}")


def _pictures(classes: int) -> ImageSource:
    """Return random pictures with labels that fit a classifier of ``classes`` classes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PICTURES, 64, 64, 3), dtype=np.uint8)
    names = [f"noise-{i}" for i in range(PICTURES)]
    labels = [i % classes for i in range(PICTURES)]
    return ImageSource(names, labels, lambda i: Image.fromarray(pixels[i]), [str(c) for c in range(classes)], "noise")


class _Enough(Exception):
    pass


def check_recipe(room: str) -> None:
    """The small recipe plans, and runs three steps on this machine's CPU, on random pictures."""
    recipe = _read(room, "recipe.yaml")
    require(any(room in entry for entry in recipe.methods), f"room {room}: recipe.yaml does not use {room}")
    small = {"batch_size": 4, "accumulate": 1, "epochs": None, "steps": STEPS}
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=small)})
    classes = recipe.model.num_classes or 1000
    sources = {k: _pictures(classes) for k in ("train", "eval", "calibration")}
    planned = set_up(recipe, sources=sources)
    rows = describe_plan(planned.model, planned.stack, planned.plan)
    require(bool(rows), f"room {room}: recipe.yaml plans no phase")
    ready = set_up(recipe, sources=sources)
    done = 0

    def count(row: dict[str, Any]) -> None:
        nonlocal done
        done += "terms" in row
        if done >= STEPS:
            raise _Enough

    options = RunOptions(on_row=count)
    loop = Loop(ready.stack, ready.task, ready.loaders, ready.plan, settings=recipe.train, options=options)
    try:
        loop.run(ready.model)
    except _Enough:
        return
    require(done > 0, f"room {room}: recipe.yaml ran no step")


ROOM_CHECKS: Mapping[str, Callable[[str], None]] = {
    "files": check_files,
    "card": check_card,
    "paper_recipe": check_paper_recipe,
    "recipe": check_recipe,
}
"""What every room of the registry must keep, by name."""
