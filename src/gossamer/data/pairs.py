"""Pictures of two domains: side by side, in trainA/trainB folders, from any two sources, or made from one.

A pair travels through sources and loaders as one sample, whose ``image`` is a ``Pair``; ``PairTransform`` turns it
into two tensors. Pictures may be paired (the same scene twice) or not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gossamer.core.errors import DataError, RecipeError, nearest
from gossamer.data.files import open_folder, open_zip
from gossamer.data.images import ImageSource, Picked, Subset
from gossamer.data.sources import open_data
from gossamer.models.preprocessing import Preprocessing

__all__ = ["UNPAIRED", "Pair", "PairTransform", "is_paired", "open_pairs", "pair_sources", "serial"]

ARROWS = {"=>": True, "->": False}
TURNED = "turned"
HALF = (0.5,)
UNPAIRED = "unpaired"
"""Key that batches of pictures without pairs have."""
ALLOWED = (
    "side:PATH (pictures with A left and B right), domains:PATH[#train] (folders trainA and trainB), grey:SPEC, "
    "edges:SPEC (made from the pictures of SPEC), 'SPEC_A -> SPEC_B' (without pairs) or 'SPEC_A => SPEC_B' (pairs), "
    "turned: before it to exchange A and B"
)


@dataclass(frozen=True)
class Pair:
    """A picture of the first domain and one of the second, both RGB."""

    image: Image.Image
    target: Image.Image


# -- sources -----------------------------------------------------------------------------------------
def _halves(picture: Image.Image) -> Pair:
    width, height = picture.size
    if width < 2:
        raise ValueError(f"{width} x {height} pixels cannot hold two pictures side by side")
    half = width // 2
    return Pair(picture.crop((0, 0, half, height)), picture.crop((half, 0, 2 * half, height)))


def _grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def _edges(picture: Image.Image) -> Image.Image:
    """Return twice the length of the Sobel gradient of the brightness (a quarter of the sums), dark on white."""
    light = np.pad(np.asarray(picture.convert("L"), dtype=np.float32), 1, mode="edge")
    across, down = light[:, 2:] - light[:, :-2], light[2:] - light[:-2]
    x, y = (_smooth(across[:-2], across[1:-1], across[2:]), _smooth(down[:, :-2], down[:, 1:-1], down[:, 2:]))
    return Image.fromarray((255 - np.clip(2 * np.hypot(x, y), 0, 255)).astype(np.uint8)).convert("RGB")


def _smooth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a + 2 * b + c) / 4


MADE: dict[str, Callable[[Image.Image], Image.Image]] = {"grey": _grey, "edges": _edges}
"""First domains that are made from pictures of the second."""


@dataclass(frozen=True)
class _Cut:
    source: ImageSource

    def __call__(self, index: int) -> Any:
        return _halves(self.source._read(index))


@dataclass(frozen=True)
class _Made:
    source: ImageSource
    kind: str

    def __call__(self, index: int) -> Any:
        picture = self.source._read(index)
        return Pair(MADE[self.kind](picture), picture)


@dataclass(frozen=True)
class _Turned:
    source: ImageSource

    def __call__(self, index: int) -> Any:
        pair: Any = self.source._read(index)
        return Pair(pair.target, pair.image)


@dataclass(frozen=True)
class _Paired:
    a: ImageSource
    b: ImageSource

    def __call__(self, index: int) -> Any:
        return Pair(self.a._read(index), self.b._read(index))


@dataclass(frozen=True)
class _Unpaired:
    """Each picture of the first domain with a random one of the second; as many as the larger domain has."""

    a: ImageSource
    b: ImageSource
    drawn: bool = True

    def __call__(self, index: int) -> Any:
        # whoever draws batches seeds Python's generator before reading
        second = random.randrange(len(self.b)) if self.drawn else index % len(self.b)
        first, other = self.a._read(index % len(self.a)), self.b._read(second)
        return Pair(
            first.image if isinstance(first, Pair) else first, other.target if isinstance(other, Pair) else other
        )


def pair_sources(a: ImageSource, b: ImageSource, *, paired: bool, what: str = "pairs") -> ImageSource:
    """Return a source whose pictures are ``Pair``s of two sources' pictures.

    Args:
        a: Pictures of the first domain.
        b: Pictures of the second.
        paired: Picture i of ``a`` belongs to picture i of ``b``; else each picture of ``a`` comes with a random
            one of ``b``, drawn anew every time, and the domains may differ in size: an epoch is as long as the
            larger one.
        what: Name of the source, for messages.

    Raises:
        DataError: Paired domains differ in size.
    """
    if paired and len(a) != len(b):
        raise DataError(
            f"{what}: {len(a)} pictures in {a.what} and {len(b)} in {b.what}; paired domains need one for one: "
            f"complete them, or translate without pairs ('SPEC_A -> SPEC_B', or task option paired: false)"
        )
    count = len(a) if paired else max(len(a), len(b))
    names = [a.names[i % len(a)] for i in range(count)]
    read: Callable[[int], Any] = _Paired(a, b) if paired else _Unpaired(a, b)
    return ImageSource(names, [0] * count, read, None, what)


def is_paired(source: ImageSource) -> bool:
    """Whether the two pictures of each pair belong together."""
    read = source._read
    return is_paired(read.source) if isinstance(read, Picked) else not isinstance(read, _Unpaired)


def serial(source: ImageSource) -> ImageSource:
    """Return an unpaired source with its second pictures in order instead of drawn, for evaluation.

    Names say both pictures (``"a -> b"``), since those of the smaller domain come again. A paired source is
    returned as it is.
    """
    read = source._read
    if isinstance(read, Picked):
        whole = serial(read.source)
        return source if whole is read.source else Subset(whole, read.indices, source.what)
    if not isinstance(read, _Unpaired):
        return source
    names = [f"{read.a.names[i % len(read.a)]} -> {read.b.names[i % len(read.b)]}" for i in range(len(source))]
    again = ImageSource(names, source.labels, replace(read, drawn=False), None, source.what)
    again.failed = source.failed  # broken pictures are told of the source, however it is read
    return again


def _flat(path: str, part: str, what: str) -> ImageSource:
    """Return all pictures of a folder or a zip archive."""
    place = Path(path).expanduser()
    opener = open_zip if place.is_file() else open_folder
    return opener(place, part, what, labelled=False)


def _made(kind: str, rest: str, spec: str) -> ImageSource:
    if kind == "side":
        path, _, part = rest.partition("#")
        source: ImageSource = _flat(path, part, spec)
        read: Callable[[int], Any] = _Cut(source)
    else:
        source = open_data(rest, labelled=False)
        read = _Made(source, kind)
    return ImageSource(source.names, [0] * len(source), read, None, spec)


def _domains(rest: str, spec: str, paired: bool) -> ImageSource:
    path, _, part = rest.partition("#")
    parts = [f"{part or 'train'}{x}" for x in "AB"]
    a, b = (_flat(path, p, f"{spec}, folder {p}") for p in parts)
    heads = [f"{p}/" for p in parts]
    names = [
        {Path(n).with_suffix("").as_posix().removeprefix(h) for n in s.names}
        for s, h in zip((a, b), heads, strict=True)
    ]
    odd = sorted(names[0] ^ names[1])
    if paired and len(a) == len(b) and odd:
        raise DataError(f"{spec}: {odd[0]!r} is in one of the folders only; pairs need the same names in both")
    return pair_sources(a, b, paired=paired, what=spec)


def _turned(inner: str, spec: str, paired: bool | None) -> ImageSource:
    """Return the pairs of ``inner`` the other way round."""
    found = open_pairs(inner, paired=True if paired is False and not _loose(inner) else paired)
    read = found._read
    if isinstance(read, _Unpaired):
        return pair_sources(read.b, read.a, paired=False, what=spec)
    turned = ImageSource(found.names, found.labels, _Turned(found), None, spec)
    return turned if paired is not False else pair_sources(turned, turned, paired=False, what=spec)


def _loose(spec: str) -> bool:
    """Whether ``spec`` names two domains of their own, which may stay without pairs."""
    return spec.startswith("domains:") or any(arrow in spec for arrow in ARROWS)


def open_pairs(spec: str, *, paired: bool | None = None) -> ImageSource:
    """Return the pairs that ``spec`` names; each sample's ``image`` is a ``Pair``.

    Args:
        spec: ``side:PATH``: pictures that hold A and B side by side (paired). ``domains:PATH#train``: folders
            trainA and trainB of a folder or zip archive (unpaired; paired ones have the same names in both).
            ``grey:SPEC``, ``edges:SPEC``: B are the pictures of SPEC, A their brightness or their edges (paired).
            ``SPEC_A -> SPEC_B`` (unpaired), ``SPEC_A => SPEC_B`` (paired): any two data specifications.
            ``turned:`` before any of these exchanges A and B.
        paired: Overrides what the form of ``spec`` says; see ``pair_sources``.

    Raises:
        DataError: Unknown kind, nothing there, or paired domains that do not match.
    """
    head, _, inner = spec.partition(":")
    if head == TURNED and inner:
        return _turned(inner, spec, paired)
    for arrow, pairs in ARROWS.items():
        if arrow in spec:
            a, b = (open_data(s.strip(), labelled=False) for s in spec.split(arrow, 1))
            return pair_sources(a, b, paired=pairs if paired is None else paired, what=spec)
    kind, _, rest = spec.partition(":")
    if kind == "domains" and rest:
        return _domains(rest, spec, bool(paired))
    if kind in ("side", *MADE) and rest:
        found = _made(kind, rest, spec)
        return found if paired is not False else pair_sources(found, found, paired=False, what=spec)
    hint = nearest(kind, ("side", "domains", TURNED, *MADE))
    raise DataError(f"data {spec!r} names no pairs; expected {ALLOWED}{hint}")


# -- from a pair to tensors --------------------------------------------------------------------------
@dataclass(frozen=True)
class PairTransform:
    """A ``Pair`` to normalised tensors ``image`` [Ca, H, W] and ``target`` [Cb, H, W].

    In training both are resized to ``load`` times the input size, cropped at random and flipped (pix2pix, section
    6.2: 286 to 256); draws come from Python's global generator, which whoever loads seeds. At evaluation they are
    resized to the input size, whatever their shape.

    Attributes:
        pre: Size, mean, std and interpolation of the first domain; the second is always brought to [-1, 1].
        channels: Channels of the second domain.
        training: Random or deterministic.
        paired: Both get the same crop and flip; else the tensors come with the key ``UNPAIRED``.
        load: Size before the crop over size after it, at least 1.
        flip: Flip half of the pictures.
    """

    pre: Preprocessing
    channels: int = 3
    training: bool = False
    paired: bool = True
    load: float = 286 / 256
    flip: bool = True

    def __post_init__(self) -> None:
        if self.load < 1:
            raise RecipeError(f"augment load={self.load}; expected 1 (no crop) or more")

    def __call__(self, pair: Any) -> dict[str, Tensor]:
        """Return the tensors of a ``Pair``, or of a single picture that holds both side by side."""
        pair = pair if isinstance(pair, Pair) else _halves(pair)
        first = self._draw()
        second = first if self.paired else self._draw()
        image = self._tensor(pair.image, self.pre.size[0], first, (self.pre.mean, self.pre.std))
        both = {"image": image, "target": self._tensor(pair.target, self.channels, second, (HALF, HALF))}
        return both if self.paired else {**both, UNPAIRED: torch.ones(())}

    def _draw(self) -> tuple[float, float, bool]:
        if not self.training:
            return 0.0, 0.0, False
        return random.random(), random.random(), self.flip and random.random() < 0.5

    def _tensor(
        self, picture: Image.Image, channels: int, how: tuple[float, float, bool], scale: tuple[Sequence[float], ...]
    ) -> Tensor:
        _, height, width = self.pre.size
        tall, wide = (round(n * self.load) if self.training else n for n in (height, width))
        method = getattr(Image.Resampling, self.pre.interpolation.upper())
        picture = picture.convert("L" if channels == 1 else "RGB")
        if picture.size != (wide, tall):
            picture = picture.resize((wide, tall), method)
        x, y, flip = how
        left, top = int(x * (wide - width + 1)), int(y * (tall - height + 1))
        picture = picture.crop((left, top, left + width, top + height))
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).view(height, width, channels).permute(2, 0, 1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in scale)
        return (pixels / 255 - mean) / std
