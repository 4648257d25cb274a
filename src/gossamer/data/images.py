"""What every image source is: a sized, indexable list of labelled pictures, some of which may be broken."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from gossamer.core.errors import DataError

__all__ = [
    "MAX_FAILED_SHARE",
    "SUFFIXES",
    "BrokenImage",
    "Failure",
    "ImageSource",
    "Remembered",
    "Picked",
    "Sample",
    "Subset",
    "UnfitPicture",
    "decode",
    "to_rgb",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""File names that count as pictures (any case)."""
MAX_FAILED_SHARE = 0.05
"""Share of broken pictures above which a source is refused."""
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, BadZipFile)
"""What PIL and the containers raise on damaged bytes."""
WORD = 65535
"""Largest value of a 16-bit channel."""
Failure = tuple[str, str]
"""(name, reason) of a broken picture."""


class BrokenImage(DataError):
    """One picture cannot be read; whoever iterates skips, counts and names it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"image {self.name!r} cannot be read ({self.reason})"


class UnfitPicture(DataError):
    """A picture that can be read but cannot serve, with the reason; raised by transforms, treated as a broken one."""


@dataclass(frozen=True)
class Sample:
    """One labelled picture: ``image`` (RGB), class index ``label`` and a ``name`` for reports."""

    image: Image.Image
    label: int
    name: str


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB of 8 bits.

    Grey is copied to three channels, 16-bit grey is divided by 257 and rounded (PIL's own conversion clips it),
    16-bit colour keeps its high bytes (PIL reads no more), a palette is looked up, alpha is dropped, CMYK goes
    through PIL's formula without a colour profile.

    Raises:
        ValueError: Floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; expected 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        top = int(values.max(initial=0))
        if top > WORD or int(values.min(initial=0)) < 0:
            raise ValueError(f"integer pixels up to {top}; expected 8 or 16 bits")
        image = Image.fromarray(((values + (WORD // 255) // 2) // (WORD // 255)).astype(np.uint8))
    return image.convert("RGB")


def decode(data: bytes | Path) -> Image.Image:
    """Return a fully decoded RGB picture of encoded bytes or a file (``to_rgb``); raises one of ``BROKEN``."""
    with Image.open(data if isinstance(data, Path) else BytesIO(data)) as image:
        return to_rgb(image)


class ImageSource:
    """Labelled pictures by index; ``source[i]`` is a ``Sample`` or raises ``BrokenImage``.

    Args:
        names: Name of each picture.
        labels: Class index of each picture.
        read: Index to decoded RGB picture; may raise on damaged data.
        classes: Names of all classes in order, where known.
        what: The specification, for messages.

    Attributes:
        failed: (name, reason) of every broken picture met so far.
        num_classes: Number of classes; without class names the highest label plus one.

    Raises:
        DataError: No pictures, or a label outside the classes.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int],
        read: Callable[[int], Image.Image],
        classes: Sequence[str] | None = None,
        what: str = "data",
    ) -> None:
        if not len(names):
            raise DataError(f"{what}: no images found; expected at least 1")
        self.names, self.labels = names, labels
        self.classes = list(classes) if classes is not None else None
        self.what = what
        self.failed: list[Failure] = []
        self._read = read
        low, high = min(labels), max(labels)
        if low < 0 or (self.classes is not None and high >= len(self.classes)):
            allowed = f"0..{len(self.classes) - 1}" if self.classes is not None else "0 or more"
            raise DataError(f"{what}: labels run from {low} to {high}; allowed are {allowed}")
        self.num_classes = len(self.classes) if self.classes is not None else int(high) + 1

    @property
    def knows_classes(self) -> bool:
        """Whether ``num_classes`` is certain: class names are known or every label occurs."""
        return self.classes is not None or len(set(self.labels)) == self.num_classes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        name = self.names[index]
        try:
            return Sample(self._read(index), int(self.labels[index]), name)
        except (*BROKEN, Image.DecompressionBombError) as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise BrokenImage(name, reason) from err

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def record(self, failures: Sequence[Failure], max_share: float = MAX_FAILED_SHARE) -> None:
        """Note broken pictures (each once).

        Raises:
            DataError: More than ``max_share`` of the source is broken.
        """
        known = {name for name, _ in self.failed}
        for name, reason in failures:
            if name not in known:
                known.add(name)
                self.failed.append((name, reason))
        if len(self.failed) > max_share * len(self):
            shown = ", ".join(name for name, _ in self.failed[:3])
            raise DataError(
                f"{self.what}: {len(self.failed)} of {len(self)} images cannot be read ({shown}: {self.failed[0][1]}); "
                f"at most {max_share:.0%} may fail. Repair or remove them"
            )


class Remembered:
    """Keeps decoded pictures in memory, for a source whose pictures are drawn from again and again.

    Args:
        read: Index to decoded picture.
        limit: Bytes of pixels kept; what is met later is decoded every time. Each worker process keeps its own.
    """

    def __init__(self, read: Callable[[int], Image.Image], limit: int = 2**29) -> None:
        self.read, self.limit = read, limit
        self._kept: dict[int, Image.Image] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}, "_bytes": 0}

    def __call__(self, index: int) -> Image.Image:
        if index in self._kept:
            return self._kept[index]
        image = self.read(index)
        size = image.width * image.height * len(image.getbands())
        if self._bytes + size <= self.limit:
            self._kept[index] = image
            self._bytes += size
        return image


class Subset(ImageSource):
    """Chosen pictures of another source, with its classes."""

    def __init__(self, source: ImageSource, indices: Sequence[int], what: str | None = None) -> None:
        chosen = list(indices)
        if chosen and not -len(source) <= min(chosen) <= max(chosen) < len(source):
            raise DataError(f"{source.what}: indices {min(chosen)}..{max(chosen)} of {len(source)} images")
        super().__init__(
            [source.names[i] for i in chosen],
            [int(source.labels[i]) for i in chosen],
            Picked(source, chosen),
            source.classes,
            what or source.what,
        )
        self.num_classes = source.num_classes
        self._knows = source.knows_classes

    @property
    def knows_classes(self) -> bool:
        return self._knows


@dataclass(frozen=True)
class Picked:
    """Reads chosen pictures of another source."""

    source: ImageSource
    indices: list[int]

    def __call__(self, index: int) -> Image.Image:
        return self.source._read(self.indices[index])
