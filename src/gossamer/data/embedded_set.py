"""The photographs that ship with the package, in three disjoint splits."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from pathlib import Path

from gossamer.core.errors import DataError, nearest
from gossamer.data.files import ZipReader
from gossamer.data.images import ImageSource

__all__ = ["SPLITS", "credits", "open_embedded"]

SPLITS = ("all", "search", "calibration", "eval")
"""``search`` (168) to search and train on, ``calibration`` (32), ``eval`` (467, never seen by either); ``all``: 667."""


def _file(name: str) -> Path:
    return Path(str(resources.files("gossamer.data.embedded").joinpath(name)))


@cache
def _rows() -> tuple[dict[str, str], ...]:
    with _file("photos.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@cache
def _classes() -> tuple[str, ...]:
    with _file("imagenet_classes.csv").open(encoding="utf-8", newline="") as file:
        return tuple(row["name"] for row in csv.DictReader(file))


def credits() -> list[dict[str, str]]:
    """Return file, author, licence and page of every photograph."""
    return [{key: row[key] for key in ("file", "author", "license", "landing_url")} for row in _rows()]


def open_embedded(split: str, what: str) -> ImageSource:
    """Return a split of the embedded photographs, labelled with the 1,000 ImageNet classes.

    Raises:
        DataError: No such split.
    """
    split = split or "all"
    if split not in SPLITS:
        raise DataError(f"{what}: split {split!r}; expected one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    rows = [r for r in _rows() if split in ("all", r["split"])]
    files = [r["file"] for r in rows]
    return ImageSource(files, [int(r["label"]) for r in rows], ZipReader(_file("photos.zip"), files), _classes(), what)
