"""A user's own pictures, enlarged by a network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.data.images import BROKEN, SUFFIXES, to_rgb
from gossamer.data.resize import imresize
from gossamer.models.store import is_saved
from gossamer.pipeline.graphs import graph_for, is_graph, resolve
from gossamer.runtimes import get
from gossamer.tasks.super_resolution import scale_of
from gossamer.tasks.task import Predict, in_evaluation, predict_with
from gossamer.tasks.tiling import enlarge

__all__ = ["upscale"]

_NO_ALPHA = (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm")
_CONVERTED = {
    "CMYK": "CMYK became RGB without a colour profile", "P": "a palette became RGB", "LAB": "LAB became RGB",
    "YCbCr": "YCbCr became RGB",
}  # fmt: skip


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Return (picture, where it goes): one file, or every picture of a folder under its own name.

    Raises:
        DataError: Nothing to read, a folder into a picture, or a picture that would be written over its original.
    """
    jobs = [(source, target / source.name if target.is_dir() else target)]
    if not source.is_file():
        if not source.is_dir():
            raise DataError(f"upscale: no file or folder {str(source)!r}")
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"upscale: {str(source)!r} holds no pictures (looked for {', '.join(SUFFIXES)})")
        if target.suffix.lower() in SUFFIXES:
            raise DataError(
                f"upscale: {str(source)!r} is a folder, {str(target)!r} a picture; name a folder to write to"
            )
        jobs = [(p, target / p.relative_to(source)) for p in found]
    if clash := next((out for path, out in jobs if out.exists() and out.samefile(path)), None):
        raise DataError(f"upscale: {str(clash)!r} is what is read; originals are not written over, name another place")
    return jobs


def _predictor(model: nn.Module | str, runtime: str, threads: int) -> tuple[Predict, int]:
    loaded, pre = resolve(model)
    scale = scale_of(pre)
    if scale is None:
        raise ModelError(
            f"upscale: the model is for {next(iter(pre.task))}; name one for super-resolution "
            f"(edsr_baseline_x2@weights.safetensors, a folder that a run has left, an exported graph)"
        )
    if isinstance(model, str) and "@" not in model and not is_graph(model) and not is_saved(model):
        raise ModelError(f"upscale: {model!r} has random weights; give '{model}@weights.safetensors' or a saved folder")
    if runtime == "torch" and isinstance(loaded, nn.Module):
        return in_evaluation(loaded), scale
    with tempfile.TemporaryDirectory() as scratch:
        session = get(runtime).load(graph_for(loaded, runtime, 1, Path(scratch)), threads=threads)
    return predict_with(lambda x: session.run(x.numpy()), pre.size), scale


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """Return a picture the right way up, and what was done to it."""
    try:
        with Image.open(path) as image:
            deep = ";16" in str(getattr(image, "tile", ""))  # PIL reads 16-bit colour as 8 bits, without a word
            image.load()
            picture = ImageOps.exif_transpose(image)
        if picture.mode == "F" or picture.mode.startswith("I"):
            to_rgb(picture)
    except (*BROKEN, Image.DecompressionBombError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(f"upscale: {str(path)!r} cannot be read ({reason}); give a picture PIL opens") from err
    notes = [_CONVERTED[picture.mode]] if picture.mode in _CONVERTED else []
    if deep or picture.mode.startswith("I"):
        notes.append("16 bits became 8")
    return picture, notes


def _enlarged(picture: Image.Image, predict: Predict, scale: int, tile: int | None, overlap: int | None) -> Image.Image:
    """Return the picture enlarged; grey stays grey, and transparency is enlarged by bicubic interpolation."""
    alpha = None
    if picture.mode in ("LA", "RGBA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    grey = picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16")
    large = Image.fromarray(enlarge(predict, np.asarray(to_rgb(picture)), scale, tile=tile, overlap=overlap))
    if alpha is not None:
        large.putalpha(Image.fromarray(imresize(np.asarray(alpha), float(scale))))
    return large.convert("L") if grey and alpha is None else large


def _one(path: Path, out: Path, predict: Predict, scale: int, tiles: tuple[int | None, int | None]) -> dict[str, Any]:
    """Enlarge one picture; return what is said of it."""
    picture, notes = _read(path)
    start = time.perf_counter()
    large = _enlarged(picture, predict, scale, *tiles)
    if large.mode in ("RGBA", "LA") and out.suffix.lower() in _NO_ALPHA:
        raise DataError(f"upscale: {str(path)!r} has transparency, which {out.suffix} cannot hold; write a .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        large.save(out)
    except (ValueError, KeyError) as err:
        endings = ", ".join(SUFFIXES)
        raise DataError(f"upscale: {str(out)!r} cannot be written ({err}); end it in one of {endings}") from err
    except OSError as err:
        raise DataError(f"upscale: {str(out)!r} cannot be written ({err.strerror or err}); name another place") from err
    return {
        "image": str(path), "out": str(out), "from": list(picture.size), "to": list(large.size),
        "seconds": round(time.perf_counter() - start, 3), "notes": notes,
    }  # fmt: skip


def upscale(  # noqa: PLR0913 - mirrors the public call
    source: Path, target: Path, model: nn.Module | str, *, scale: int | None, runtime: str, tile: int | None,
    overlap: int | None, threads: int, tick: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """See ``gossamer.api.upscale``."""
    jobs = _jobs(source, target)
    predict, own = _predictor(model, runtime, threads)
    if scale is not None and scale != own:
        raise RecipeError(
            f"upscale: scale {scale} was asked for, the model enlarges by {own}; name a model of scale {scale}"
        )
    rows: list[dict[str, Any]] = []
    for path, out in jobs:
        try:
            row = _one(path, out, predict, own, (tile, overlap))
        except DataError as err:
            if len(jobs) == 1:
                raise
            row = {"image": str(path), "out": None, "from": None, "to": None, "seconds": 0.0, "notes": [str(err)]}
            tick(str(err))
        else:
            sizes = "{}x{} to {}x{}".format(*row["from"], *row["to"])
            tick("; ".join([f"{out}: {sizes}", *row["notes"]]))
        rows.append(row)
    return rows
