"""Pictures in folders and zip archives: class sub-folders, or ``labels.csv`` with columns file,label."""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from gossamer.core.errors import DataError
from gossamer.data.images import SUFFIXES, ImageSource, decode

__all__ = ["ZipReader", "open_folder", "open_zip"]

LABELS, CLASSES = "labels.csv", "classes.csv"
CLASS_COLUMNS = ("name", "class", "wnid", "label")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts folder 2 before folder 10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]


def _by_folders(files: Sequence[str], what: str) -> tuple[list[str], list[int], list[str]]:
    """Return files, labels and classes where each picture's first folder is its class."""
    inside = [f for f in files if "/" in f]
    if not inside:
        raise DataError(
            f"{what}: {len(files)} images without labels; expected one sub-folder per class, or {LABELS} with "
            f"columns file,label"
        )
    names = {f.split("/", 1)[0] for f in inside}
    # class number = position in name order, as torchvision's ImageFolder; plain numbers count as numbers
    classes = sorted(names, key=_natural) if all(n.isdigit() for n in names) else sorted(names)
    index = {name: i for i, name in enumerate(classes)}
    return inside, [index[f.split("/", 1)[0]] for f in inside], classes


def _class_names(text: str | None) -> list[str] | None:
    """Return the class names of classes.csv (columns index and name), in index order."""
    if text is None:
        return None
    rows = list(csv.DictReader(io.StringIO(text)))
    column = next((c for c in CLASS_COLUMNS if rows and c in rows[0]), None)
    if column is None or "index" not in rows[0]:
        raise DataError(f"{CLASSES}: expected columns index,name; got {list(rows[0]) if rows else 'no rows'}")
    return [row[column] for row in sorted(rows, key=lambda r: int(r["index"]))]


def _by_table(
    table: str, classes: list[str] | None, prefix: str, what: str
) -> tuple[list[str], list[int], list[str] | None]:
    """Return files, labels and classes of a labels.csv; text labels are numbered in name order."""
    rows = list(csv.DictReader(io.StringIO(table)))
    if not rows or "file" not in rows[0] or "label" not in rows[0]:
        got = list(rows[0]) if rows else "no rows"
        raise DataError(f"{what}: {LABELS} has {got}; expected columns file,label")
    rows = [r for r in rows if r["file"] and r["file"].startswith(prefix)]
    labels = [(r["label"] or "").strip() for r in rows]
    if all(re.fullmatch(r"-?\d+", text) for text in labels):
        return [r["file"] for r in rows], [int(text) for text in labels], classes
    names = classes or sorted(set(labels))
    index = {name: i for i, name in enumerate(names)}
    unknown = [text for text in labels if text not in index]
    if unknown:
        raise DataError(f"{what}: label {unknown[0]!r} is not among the {len(names)} classes of {CLASSES}")
    return [r["file"] for r in rows], [index[text] for text in labels], names


def _is_picture(name: str) -> bool:
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and not any(p.startswith((".", "__MACOSX")) for p in parts)


def _describe(
    files: Sequence[str], text_of: Callable[[str], str | None], prefix: str, what: str, labelled: bool
) -> tuple[list[str], list[int], list[str] | None]:
    """Find pictures and labels below ``prefix`` (``""`` or ending in ``/``); file names are returned whole."""
    if not labelled:
        found = sorted(f for f in files if f.startswith(prefix) and _is_picture(f[len(prefix) :]))
        if not found:
            raise DataError(f"{what}: no images found (looked for {', '.join(SUFFIXES)})")
        return found, [0] * len(found), None
    table = text_of(f"{prefix}{LABELS}")
    if table is not None:
        classes = _class_names(text_of(f"{prefix}{CLASSES}"))
        below, labels, names = _by_table(table, classes, "", what)
        return [prefix + f for f in below], labels, names
    table = text_of(LABELS) if prefix else None
    if table is not None:
        return _by_table(table, _class_names(text_of(CLASSES)), prefix, what)
    below = sorted(f[len(prefix) :] for f in files if f.startswith(prefix) and _is_picture(f))
    if not below:
        raise DataError(f"{what}: no images found (looked for {', '.join(SUFFIXES)})")
    below, labels, names = _by_folders(below, what)
    return [prefix + f for f in below], labels, names


def _prefix(part: str) -> str:
    return f"{part.strip('/')}/" if part.strip("/") else ""


class _FolderReader:
    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root, self.files = root, files

    def __call__(self, index: int) -> Image.Image:
        return decode(self.root / self.files[index])


def open_folder(path: Path, part: str, what: str, *, labelled: bool = True) -> ImageSource:
    """Return the pictures of a folder, of its sub-folder ``part`` where given; all below it if not ``labelled``.

    Raises:
        DataError: No folder, no pictures, no labels.
    """
    if not path.is_dir():
        raise DataError(f"{what}: no folder {str(path)!r}")
    root = path
    found = [
        (Path(folder) / f).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True)
        for f in files
    ]

    def text_of(name: str) -> str | None:
        file = root / name
        return file.read_text(encoding="utf-8-sig") if file.is_file() else None

    files, labels, classes = _describe(found, text_of, _prefix(part), what, labelled)
    return ImageSource(files, labels, _FolderReader(root, files), classes, what)


class ZipReader:
    """Reads members of an archive; each process opens the archive for itself."""

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.path, self.files = path, files
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def archive(self) -> zipfile.ZipFile:
        """Return this process's handle."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __call__(self, index: int) -> Image.Image:
        try:
            data = self.archive().read(self.files[index])
        except KeyError:
            raise OSError("not in the archive") from None
        return decode(data)


def open_zip(path: Path, part: str, what: str, *, labelled: bool = True) -> ImageSource:
    """Return the pictures of a zip archive, of its folder ``part`` where given; all below it if not ``labelled``.

    Raises:
        DataError: No such file, not a zip archive, no pictures, no labels.
    """
    if not path.is_file():
        raise DataError(f"{what}: no file {str(path)!r}")
    reader = ZipReader(path, [])
    try:
        archive = reader.archive()
        found = [n for n in archive.namelist() if not n.endswith("/")]
    except (zipfile.BadZipFile, OSError) as err:
        raise DataError(f"{what}: {str(path)!r} is not a readable zip archive ({err})") from err

    def text_of(name: str) -> str | None:
        return archive.read(name).decode("utf-8-sig") if name in found else None

    files, labels, classes = _describe(found, text_of, _prefix(part), what, labelled)
    reader.files = files
    return ImageSource(files, labels, reader, classes, what)
