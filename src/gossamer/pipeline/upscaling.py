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
from gossamer.pipeline.graphs import graph_for, resolve
from gossamer.runtimes import get
from gossamer.tasks.super_resolution import scale_of
from gossamer.tasks.task import Predict, in_evaluation, predict_with
from gossamer.tasks.tiling import enlarge

__all__ = ["upscale"]

_NO_ALPHA = (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm")
_CONVERTED = {"CMYK": "CMYK became RGB without a colour profile", "P": "a palette became RGB"}


def _jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Return (picture, where it goes): one file, or every picture of a folder under its own name."""
    if source.is_file():
        return [(source, target)]
    if not source.is_dir():
        raise DataError(f"upscale: no file or folder {str(source)!r}")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"upscale: {str(source)!r} holds no pictures (looked for {', '.join(SUFFIXES)})")
    if target.suffix.lower() in SUFFIXES:
        raise DataError(f"upscale: {str(source)!r} is a folder, {str(target)!r} a picture; name a folder to write to")
    return [(p, target / p.relative_to(source)) for p in found]


def _predictor(model: nn.Module | str, runtime: str, threads: int) -> tuple[Predict, int]:
    loaded, pre = resolve(model)
    scale = scale_of(pre)
    if scale is None:
        raise ModelError(
            f"upscale: the model is for {next(iter(pre.task))}; name one for super-resolution "
            f"(edsr_baseline_x2@weights.safetensors, a folder that a run has left, an exported graph)"
        )
    if runtime == "torch" and isinstance(loaded, nn.Module):
        return in_evaluation(loaded), scale
    with tempfile.TemporaryDirectory() as scratch:
        session = get(runtime).load(graph_for(loaded, runtime, 1, Path(scratch)), threads=threads)
    return predict_with(lambda x: session.run(x.numpy()), pre.size), scale


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """Return a picture the right way up, and what was done to it."""
    try:
        with Image.open(path) as image:
            image.load()
            picture = ImageOps.exif_transpose(image)
    except (*BROKEN, Image.DecompressionBombError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(f"upscale: {str(path)!r} cannot be read ({reason}); give a picture PIL opens") from err
    notes = [_CONVERTED[picture.mode]] if picture.mode in _CONVERTED else []
    if picture.mode.startswith("I"):
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
    rows = []
    for path, out in jobs:
        picture, notes = _read(path)
        start = time.perf_counter()
        large = _enlarged(picture, predict, own, tile, overlap)
        if large.mode in ("RGBA", "LA") and out.suffix.lower() in _NO_ALPHA:
            raise DataError(f"upscale: {str(path)!r} has transparency, which {out.suffix} cannot hold; write a .png")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            large.save(out)
        except (OSError, ValueError, KeyError) as err:
            endings = ", ".join(SUFFIXES)
            raise DataError(f"upscale: {str(out)!r} cannot be written ({err}); end it in one of {endings}") from err
        row = {
            "image": str(path), "out": str(out), "from": list(picture.size), "to": list(large.size),
            "seconds": round(time.perf_counter() - start, 3), "notes": notes,
        }  # fmt: skip
        rows.append(row)
        sizes = f"{picture.width}x{picture.height} to {large.width}x{large.height}"
        tick("; ".join([f"{out}: {sizes}", *notes]))
    return rows
