"""Pictures in parquet and arrow tables, and Hugging Face datasets; both libraries are optional."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from gossamer.core.errors import DataError
from gossamer.data.images import ImageSource, decode

__all__ = ["open_hf", "open_parquet"]

IMAGE_COLUMNS = ("image", "img", "image_bytes", "jpg", "png", "picture", "bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "y")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
MAX_TABLE_BYTES = 8 * 2**30


def _optional(module: str, extra: str, what: str) -> Any:
    try:
        return import_module(module)
    except ImportError as err:
        raise DataError(
            f"{what} needs {module.partition('.')[0]}, which is not installed; run: pip install 'gossamer[{extra}]'"
        ) from err


def _column(kind: str, names: Sequence[str], usual: Sequence[str], what: str) -> str:
    found = next((n for n in usual if n in names), None)
    if found is None:
        raise DataError(f"{what}: no {kind} column among {list(names)}; expected one of {', '.join(usual)}")
    return found


def _numbered(labels: list[Any], names: list[str] | None, what: str) -> tuple[list[int], list[str] | None]:
    """Return integer labels; text labels are numbered in name order."""
    if any(v is None for v in labels):
        raise DataError(f"{what}: label of row {labels.index(None)} is missing")
    if labels and isinstance(labels[0], str):
        names = names or sorted(set(labels))
        index = {name: i for i, name in enumerate(names)}
        return [index[v] for v in labels], names
    return [int(v) for v in labels], names


class _Cells:
    """Encoded pictures of an arrow column (binary, or a struct with ``bytes`` and ``path``)."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __call__(self, index: int) -> Image.Image:
        return _picture(self.column[index].as_py())


def _picture(cell: Any) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None:
        raise ValueError("empty cell")
    return decode(Path(cell) if isinstance(cell, str) else cell)


def _feature_names(schema: Any, column: str) -> list[str] | None:
    """Return class names that the datasets library left in a table's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names")


def _read_table(file: Path, what: str) -> Any:
    pa = _optional("pyarrow", "parquet", what)
    parquet = _optional("pyarrow.parquet", "parquet", what)
    try:
        if file.suffix == ".parquet":
            return parquet.read_table(file)
        mapped = pa.memory_map(str(file))
        try:
            return pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped).read_all()
    except (pa.ArrowException, OSError) as err:
        reason = str(err).splitlines()[0]
        raise DataError(f"{what}: {str(file)!r} is not a readable {file.suffix[1:]} table ({reason})") from err


def open_parquet(path: Path, what: str) -> ImageSource:
    """Return the pictures of a parquet or arrow file, or of a folder of them.

    Arrow files are memory-mapped; parquet files are read whole (as encoded pictures).

    Raises:
        DataError: Nothing there, unreadable, no picture or label column, pyarrow missing, or more
            parquet than fits in memory.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in TABLE_SUFFIXES)
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise DataError(f"{what}: no {', '.join(TABLE_SUFFIXES)} file at {str(path)!r}")
    size = sum(f.stat().st_size for f in files if f.suffix == ".parquet")
    if size > MAX_TABLE_BYTES:
        raise DataError(
            f"{what}: {size / 2**30:.1f} GiB of parquet; at most {MAX_TABLE_BYTES // 2**30} GiB are read into memory. "
            f"Use hf:{path}, which maps it from disk"
        )
    pa = _optional("pyarrow", "parquet", what)
    tables = [_read_table(f, what) for f in files]
    names = tables[0].column_names
    image, label = _column("image", names, IMAGE_COLUMNS, what), _column("label", names, LABEL_COLUMNS, what)
    try:
        table = pa.concat_tables([t.select([image, label]) for t in tables])
    except (pa.ArrowException, KeyError) as err:
        raise DataError(f"{what}: the {len(tables)} tables have different columns ({err})") from err
    labels, classes = _numbered(table.column(label).to_pylist(), _feature_names(tables[0].schema, label), what)
    return ImageSource([f"row{i}" for i in range(len(labels))], labels, _Cells(table.column(image)), classes, what)


class _Rows:
    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __call__(self, index: int) -> Image.Image:
        return _picture(self.dataset[index][self.column])


def _load_hf(hf: Any, name: str, split: str, what: str) -> Any:
    """Return one split of a dataset folder written by ``save_to_disk``, of a local path, or of a name."""
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = hf.load_from_disk(name)
        else:
            data = hf.load_dataset(name)
    except (OSError, ValueError, RuntimeError, ImportError, hf.exceptions.DatasetsError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(f"{what}: datasets could not load it ({reason}); give a local folder or a known name") from err
    if not isinstance(data, dict):
        if split:
            raise DataError(f"{what}: {name!r} has no splits; drop '#{split}'")
        return data
    chosen = split or (next(iter(data)) if len(data) == 1 else "")
    if chosen not in data:
        got = f"split {split!r}" if split else "no split"
        raise DataError(f"{what}: got {got}; expected one of {', '.join(data)}, as 'hf:{name}#{next(iter(data))}'")
    return data[chosen]


def open_hf(name: str, split: str, what: str) -> ImageSource:
    """Return a Hugging Face dataset by name or local path, its split after ``#``.

    Raises:
        DataError: datasets missing, nothing found, no such split, no picture or label column.
    """
    hf = _optional("datasets", "hf", what)
    data = _load_hf(hf, name, split, what)
    image = _column("image", data.column_names, IMAGE_COLUMNS, what)
    label = _column("label", data.column_names, LABEL_COLUMNS, what)
    names = getattr(data.features[label], "names", None)
    labels, classes = _numbered(list(data.with_format(None)[label]), names, what)
    if isinstance(data.features[image], hf.Image):
        data = data.cast_column(image, hf.Image(decode=False))  # so that a broken picture fails alone
    reader = _Rows(data.with_format(None), image)
    return ImageSource([f"row{i}" for i in range(len(data))], labels, reader, classes, what)
