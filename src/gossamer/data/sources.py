"""From a data specification (``folder:photos/val``) to an image source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.core.errors import DataError, nearest
from gossamer.data.embedded_set import open_embedded
from gossamer.data.files import open_folder, open_zip
from gossamer.data.grids import open_npz
from gossamer.data.images import BrokenImage, ImageSource, Sample, Subset
from gossamer.data.tables import open_hf, open_parquet

__all__ = [
    "KINDS",
    "BrokenImage",
    "ImageSource",
    "Sample",
    "check_classes",
    "from_dataset",
    "hold_out",
    "model_classes",
    "open_data",
    "take",
]

KINDS = ("folder", "zip", "npz", "parquet", "hf", "embedded")
SLICE = re.compile(r"^(?P<rest>.*)\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d+))?\]$")
ALLOWED = "folder:PATH, zip:PATH, npz:PATH, parquet:PATH, hf:NAME-or-PATH, embedded[:search|calibration|eval]"


def _sliced(text: str) -> tuple[str, slice | None]:
    """Split ``rest[a:b:c]`` into its parts, unless a file of that very name exists."""
    match = SLICE.match(text)
    if match is None or Path(text).exists():
        return text, None
    start, stop, step = (int(v) if v else None for v in match.group("start", "stop", "step"))
    return match["rest"], slice(start, stop, step)


def _parted(text: str) -> tuple[str, str]:
    """Split ``path#part`` into its parts, unless a file of that very name exists."""
    if "#" not in text or Path(text).exists():
        return text, ""
    path, _, part = text.rpartition("#")
    return path, part


def open_data(spec: str, *, labelled: bool = True) -> ImageSource:
    """Return the images that ``spec`` names.

    Args:
        spec: ``folder:PATH`` (class sub-folders, or ``labels.csv`` with columns file,label),
            ``zip:PATH`` (the same in an archive), ``npz:PATH``, ``parquet:PATH``,
            ``hf:NAME-or-PATH``, ``embedded`` or ``embedded:search``, ``:calibration``, ``:eval``.
            ``#part`` after a path chooses a sub-folder (folder, zip) or a split (hf);
            ``[from:to]`` or ``[from:to:every]`` at the end chooses a range of images.
        labelled: Whether the images need labels; else a folder or archive is any pictures, at any depth.

    Raises:
        DataError: Unknown kind, nothing there, unreadable, no images or no labels.
    """
    kind, colon, rest = spec.partition(":")
    bare, _ = _sliced(kind)
    if bare == "embedded":
        kind, rest = "embedded", rest if colon else spec[len("embedded") :]
    if kind not in KINDS or (kind != "embedded" and not rest):
        raise DataError(f"data {spec!r} is no data specification; expected {ALLOWED}{nearest(kind, KINDS)}")
    rest, chosen = _sliced(rest)
    path, part = _parted(rest)
    if kind == "folder":
        source = open_folder(Path(path).expanduser(), part, spec, labelled=labelled)
    elif kind == "zip":
        source = open_zip(Path(path).expanduser(), part, spec, labelled=labelled)
    elif kind == "hf":
        source = open_hf(path, part, spec)
    elif part and kind != "embedded":
        raise DataError(f"data {spec!r}: '#{part}' applies to folder, zip and hf; not to {kind}")
    elif kind == "npz":
        source = open_npz(Path(path).expanduser(), spec)
    elif kind == "parquet":
        source = open_parquet(Path(path).expanduser(), spec)
    else:
        source = open_embedded(rest, spec)
    return source if chosen is None else Subset(source, range(len(source))[chosen], spec)


def take(source: ImageSource, indices: Sequence[int]) -> ImageSource:
    """Return the chosen images of a source, with its classes.

    Raises:
        DataError: No index, or one out of range.
    """
    return Subset(source, indices)


def hold_out(source: ImageSource, share: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Split a source at random into the rest and a held-out ``share`` in (0, 1); a function of ``seed``.

    Raises:
        DataError: One of the two would be empty.
    """
    count = round(share * len(source))
    if not 0 < count < len(source):
        raise DataError(f"{source.what}: holding out {share:g} of {len(source)} images leaves a part empty")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(source, sorted(order[count:])), Subset(source, sorted(order[:count]))


def _to_picture(value: Any) -> Image.Image:
    """Return an RGB picture of a PIL image, a uint8 or [0, 1] array [H, W(, C)] or tensor [C, H, W]."""
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.permute(1, 2, 0) if value.ndim == 3 else value).numpy()
    pixels = np.asarray(value)
    if pixels.dtype.kind == "f":
        if pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(
                f"float image with values {pixels.min():.3g}..{pixels.max():.3g}; expected 0..1, before normalisation"
            )
        pixels = np.round(pixels * 255)
    pixels = pixels.astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels).convert("RGB")


class _Items:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Image.Image:
        return _to_picture(self.dataset[index][0])


def _labels(dataset: Any) -> list[int]:
    """Return all labels; datasets that keep them apart (``targets``, ``labels``) are not decoded for it."""
    for name in ("targets", "labels"):
        known = getattr(dataset, name, None)
        if known is not None and len(known) == len(dataset):
            return [int(v) for v in known]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def from_dataset(
    dataset: Any, classes: Sequence[str] | None = None, labels: Sequence[int] | None = None
) -> ImageSource:
    """Return the images of any sized torch ``Dataset`` whose items are (image, label).

    Args:
        dataset: Images are PIL, uint8 arrays [H, W, C], or tensors [C, H, W] (uint8, or floats in
            [0, 1]); gossamer resizes, augments and normalises them itself. An ``ImageSource`` is
            returned as it is.
        classes: Class names; default the dataset's ``classes``.
        labels: Labels by index, where reading them from the items would be slow.

    Raises:
        DataError: Not a sized dataset of (image, label), or empty.
    """
    if isinstance(dataset, ImageSource):
        return dataset
    what = type(dataset).__name__
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not sized:
        raise DataError(
            f"data is {what}; expected a specification ({ALLOWED}) or a torch Dataset with a "
            f"length and (image, label) items"
        )
    try:
        found = [int(v) for v in labels] if labels is not None else _labels(dataset)
    except (TypeError, IndexError, KeyError, ValueError) as err:
        raise DataError(f"{what}: items are not (image, label) with an integer label ({err})") from err
    names = classes if classes is not None else getattr(dataset, "classes", None)
    return ImageSource([str(i) for i in range(len(found))], found, _Items(dataset), names, what)


def model_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a model's classifier, where it says so."""
    count = getattr(model, "num_classes", None)
    return int(count) if isinstance(count, int) and count > 0 else None


def check_classes(source: ImageSource, model: nn.Module) -> int:
    """Check that data and classifier have the same classes; return the classifier's number of classes.

    Where a source has neither class names nor all labels, it may have fewer.

    Raises:
        DataError: The numbers differ.
    """
    head = model_classes(model)
    if head is None:
        return source.num_classes
    if source.num_classes > head or (source.knows_classes and source.num_classes != head):
        raise DataError(
            f"{source.what} has {source.num_classes} classes, the model's head has {head}; "
            f"use data with {head} classes, or a model with num_classes={source.num_classes}"
        )
    return head
