"""Small pictures in one ``.npz``: plain arrays, or sheets of 25 x 40 tiles as encoded pictures.

A sheet file (CIFAR, MNIST, Fashion-MNIST) holds ``grid0``, ``grid1``, ... (bytes of a WebP, PNG or JPEG of
1,000 tiles, row major), ``labels`` and ``index``. A plain file holds ``images`` (or ``x``) uint8 [N, H, W] or
[N, H, W, C] and ``labels`` (or ``y``).
"""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from gossamer.core.errors import DataError
from gossamer.data.images import ImageSource

__all__ = ["open_npz"]

ROWS, COLUMNS = 25, 40


class _Sheets:
    """Decodes sheets on first use and keeps them."""

    def __init__(self, sheets: list[bytes]) -> None:
        self.sheets = sheets
        self._tiles: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"sheets": self.sheets, "_tiles": {}}

    def _decode(self, sheet: int) -> np.ndarray:
        if sheet not in self._tiles:
            with Image.open(BytesIO(self.sheets[sheet])) as image:
                pixels = np.asarray(image.convert("RGB"))
            height, width = pixels.shape[0] // ROWS, pixels.shape[1] // COLUMNS
            tiles = pixels.reshape(ROWS, height, COLUMNS, width, 3).swapaxes(1, 2)
            self._tiles[sheet] = tiles.reshape(ROWS * COLUMNS, height, width, 3)
        return self._tiles[sheet]

    def __call__(self, index: int) -> Image.Image:
        sheet, tile = divmod(index, ROWS * COLUMNS)
        return Image.fromarray(self._decode(sheet)[tile])


class _Array:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __call__(self, index: int) -> Image.Image:
        pixels = self.pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).convert("RGB")


def _check_array(pixels: np.ndarray, what: str) -> None:
    shaped = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))
    if pixels.dtype != np.uint8 or not shaped:
        raise DataError(
            f"{what}: images are {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, H, W] or [N, H, W, 1 or 3]"
        )


def open_npz(path: Path, what: str) -> ImageSource:
    """Return the pictures of an ``.npz`` file.

    Raises:
        DataError: No such file, unreadable, or another layout.
    """
    if not path.is_file():
        raise DataError(f"{what}: no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as err:
        raise DataError(f"{what}: {str(path)!r} is not a readable .npz file ({err})") from err
    labels = next((data[k] for k in ("labels", "y") if k in data), None)
    pixels = next((data[k] for k in ("images", "x") if k in data), None)
    sheets = [data[f"grid{i}"].tobytes() for i in range(len(data)) if f"grid{i}" in data]
    if labels is None or (pixels is None and not sheets):
        raise DataError(f"{what}: keys are {sorted(data)}; expected images (or grid0, grid1, ...) and labels")
    count = len(pixels) if pixels is not None else len(sheets) * ROWS * COLUMNS
    if labels.ndim != 1 or len(labels) > count or (pixels is not None and len(labels) != count):
        raise DataError(f"{what}: {labels.shape} labels for {count} images; expected one each")
    if pixels is not None:
        _check_array(pixels, what)
    reader = _Array(pixels) if pixels is not None else _Sheets(sheets)
    positions = data.get("index", np.arange(len(labels)))
    return ImageSource([str(i) for i in positions.tolist()], [int(v) for v in labels.tolist()], reader, None, what)
