"""The list of methods: read from the front matter of the rooms' cards, loaded on use.

A room is a package with a ``card.md``. Ours live under ``gossamer.methods``; other packages add
theirs through the entry-point group ``gossamer.methods`` (value: the room's package).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

import yaml

from gossamer.core.errors import ModelError, RecipeError, nearest

if TYPE_CHECKING:  # importing torch takes seconds; listing the methods needs none of it
    from gossamer.core.method import Method

__all__ = ["MethodInfo", "build", "card", "find", "info", "methods", "name_of", "options_of", "room"]


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One registered method, as its card states it.

    Attributes:
        name: Room name and recipe key (``"ptq_vit"``).
        cls: Class name (``"PTQViT"``).
        title: Title of the paper.
        arxiv: arXiv identifier, or ``""``.
        family: Family of methods (tokens, quantization, distillation, ...).
        tasks: Tasks it applies to.
        stage: Stage of the protocol.
        touches: What it changes.
        status: ``reproduced``, ``mathematics checked``, ``reconstruction`` or ``baseline``.
        package: Importable package of the room.
        default_for: Jobs the method offers itself for when a user names the job and no method, with the options
            for it (``{"int8": {"per_channel": True}}``).
    """

    name: str
    cls: str
    title: str
    arxiv: str
    family: str
    tasks: tuple[str, ...]
    stage: str
    touches: tuple[str, ...]
    status: str
    package: str
    default_for: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def _front_matter(text: str, where: str) -> dict[str, Any]:
    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise ModelError(f"{where}: card.md has no front matter; start it with '---' and the method's fields")
    return yaml.safe_load(parts[1])


@cache
def methods() -> dict[str, MethodInfo]:
    """Return all registered methods by name, without importing any."""
    rooms: list[tuple[str, Traversable]] = [
        (f"gossamer.methods.{d.name}", d)
        for d in resources.files("gossamer.methods").iterdir()
        if d.is_dir() and d.joinpath("card.md").is_file()
    ]
    for point in metadata.entry_points(group="gossamer.methods"):
        rooms.append((point.value, resources.files(point.value)))
    found = {}
    for package, folder in rooms:
        front = _front_matter(folder.joinpath("card.md").read_text(encoding="utf-8"), package)
        name = package.rpartition(".")[2]
        found[name] = MethodInfo(
            name=name,
            cls=front["class"],
            title=front["title"],
            arxiv=str(front.get("arxiv") or ""),
            family=front["family"],
            tasks=tuple(front["tasks"]),
            stage=front["stage"],
            touches=tuple(front["touches"]),
            status=front["status"],
            package=package,
            default_for=dict(front.get("default_for") or {}),
        )
    return dict(sorted(found.items()))


def info(name: str) -> MethodInfo:
    """Return the entry of a method by room name or class name.

    Raises:
        RecipeError: No such method; names the nearest.
    """
    known = methods()
    for entry in known.values():
        if name in (entry.name, entry.cls, entry.name.replace("_", "-")):
            return entry
    raise RecipeError(f"method {name!r} is unknown; known are {', '.join(known)}{nearest(name, known)}")


def room(name: str) -> Traversable:
    """Return the folder of a method's room."""
    return resources.files(info(name).package)


def card(name: str) -> str:
    """Return the card of a method, front matter removed."""
    return room(name).joinpath("card.md").read_text(encoding="utf-8").split("---\n", 2)[2].lstrip()


@cache
def find(name: str) -> type[Method]:
    """Import and return a method's class by room name or class name."""
    entry = info(name)
    return getattr(importlib.import_module(entry.package), entry.cls)


def build(name: str, options: dict[str, Any]) -> Method:
    """Return a method built from plain options.

    Raises:
        RecipeError: Unknown method or option (with the nearest right name), or a wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    cls = find(name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in options:
        if key not in fields:
            known = ", ".join(fields)
            raise RecipeError(f"{name}: option {key!r} is unknown; options are {known}{nearest(key, fields)}")
    check = TypeAdapter(cls)
    try:
        return check.validate_python(options)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "options"
        raise RecipeError(f"{name}: {where}={first['input']!r}: {first['msg']}") from None


def name_of(method: Method) -> str:
    """Return the registry name of a method instance (its class's package)."""
    return type(method).__module__.rpartition(".")[0].rpartition(".")[2]


def options_of(method: Method) -> dict[str, Any]:
    """Return a method's fields as plain JSON; what JSON cannot hold is named, not stored."""

    def plain(value: Any) -> Any:
        try:
            return json.loads(json.dumps(value))
        except TypeError:
            return f"<{type(value).__name__}>"

    return {f.name: plain(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]
