"""Batches: a stateless step loader for training and calibration, a plain iterator for evaluation.

Every random number of a sample comes from (seed, phase, step, position in the batch), so batches are the same
with any number of workers, after a resume, and, put together, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gossamer.core.errors import DataError, RecipeError, nearest
from gossamer.core.schedule import Batch, Step
from gossamer.data.images import MAX_FAILED_SHARE, BrokenImage, Failure, ImageSource, UnfitPicture
from gossamer.data.transforms import PictureTransform, Rendering, Transform

__all__ = ["Mixing", "StepLoader", "batches", "positions"]

Item = tuple[Tensor | dict[str, Tensor] | None, int, str, list[Failure]]
"""Input, or tensors by name (``None`` if none could be read), label, name, broken pictures met on the way."""
Request = tuple[int, int, Rendering | None]
"""Seed of a picture's augmentation, its index in the source, how it is made."""


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of whole batches (timm's ``Mixup`` in batch mode).

    Attributes:
        mixup: Beta parameter of mixup, 0 is off.
        cutmix: Beta parameter of cutmix, 0 is off.
        smoothing: Label smoothing of the mixed targets, in [0, 1).
        prob: Share of the batches that are mixed.
        switch_prob: Share of cutmix where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; expected 0 (off) or more")
        for name in ("smoothing", "prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; expected 0..1")

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @classmethod
    def of(cls, given: Mixing | Mapping[str, float] | None) -> Mixing:
        """Return ``given`` as a ``Mixing``."""
        if isinstance(given, Mixing):
            return given
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given or {}:
            if key not in known:
                hint = nearest(key, known)
                raise RecipeError(f"mixing option {key!r} is unknown; options are {', '.join(known)}{hint}")
        return cls(**(given or {}))


def positions(batch_size: int, rank: int, world: int) -> list[int]:
    """Return the places of a batch that one rank handles.

    A rank gets a slice of the first half and its mirror image of the second, because timm mixes
    place i with place B-1-i: mixed batches, put together, then equal those of one process.

    Raises:
        RecipeError: The batch does not divide by the ranks.
    """
    if batch_size % world or batch_size < world:
        raise RecipeError(f"batch size {batch_size} over {world} processes; expected a multiple of {world}")
    each = batch_size // world
    if each % 2:
        return list(range(rank * each, (rank + 1) * each))
    first = range(rank * each // 2, (rank + 1) * each // 2)
    return [*first, *(batch_size - 1 - p for p in reversed(first))]


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the global generators, which the transforms draw from, on exit."""
    kept = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.random.set_rng_state(kept[2])


def _seed(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)


class _Samples(Dataset):
    """Items by request (seed, index, rendering): transformed picture, label, name, what was broken on the way."""

    def __init__(self, source: ImageSource, transform: Transform, max_share: float) -> None:
        self.source, self.transform = source, transform
        self.tries = int(max_share * len(source)) + 1

    def __getitem__(self, request: Request) -> Item:
        key, index, rendering = request
        transform = self.transform
        if rendering is not None and isinstance(transform, PictureTransform):
            transform = transform.at(rendering)
        failures: list[Failure] = []
        for shift in range(self.tries):
            _seed(key + shift)  # a source may draw too: the picture of the other, unpaired domain
            try:
                sample = self.source[(index + shift) % len(self.source)]
            except BrokenImage as err:
                failures.append((err.name, err.reason))
                continue
            try:
                return transform(sample.image), sample.label, sample.name, failures
            except UnfitPicture as err:
                failures.append((sample.name, str(err)))
        return None, 0, "", failures  # more in a row than may fail in all: recording them raises


def _collate(items: Sequence[Item]) -> tuple[Batch, list[Failure]]:
    failures = [f for item in items for f in item[3]]
    views = [item[0] for item in items if item[0] is not None]
    if len(views) < len(items):
        return {}, failures
    rows = [v if isinstance(v, dict) else {"image": v} for v in views]
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {"target": torch.tensor([i[1] for i in items]), **tensors, "id": [i[2] for i in items]}, failures


@dataclass
class StepLoader:
    """Step to batch; a function of (seed, phase, step index, rank) alone.

    Each epoch is a permutation of the source; epochs follow one another without a gap, so a batch may
    end one and begin the next. A broken picture's place is taken by the next one of the source.

    Attributes:
        source: Images.
        transform: Picture to tensor.
        batch_size: Images of a step over all ranks.
        seed: Seed, beside that of the step.
        shuffle: Permute every epoch; else source order.
        workers: Worker processes that read ahead; 0 reads in this process.
        rank: Rank of this process.
        world: Number of processes.
        mixing: ``Mixing`` (or its fields as a mapping); targets become [B, K] where it is active.
        num_classes: K of mixed targets; default the source's.
        max_failed_share: Share of broken pictures above which ``DataError`` is raised.
        rendering: Step to ``Rendering``, for inputs whose size or augmentation changes in the course of
            a training (see ``rendered``); may change its mind about steps that were not drawn yet.

    Raises:
        RecipeError: The batch does not divide by the ranks, is odd with mixing, or ``rendering`` is given
            with a transform that has one form only.
    """

    source: ImageSource
    transform: Transform
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    workers: int = 0
    rank: int = 0
    world: int = 1
    mixing: Mixing | Mapping[str, float] | None = None
    num_classes: int | None = None
    max_failed_share: float = MAX_FAILED_SHARE
    rendering: Callable[[Step], Rendering] | None = None
    _orders: dict[tuple[int, str, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _ahead: _Ahead | None = field(default=None, init=False, repr=False)
    _last: tuple[Step, Rendering | None, Batch] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise RecipeError(f"batch size {self.batch_size}, workers {self.workers}; expected at least 1 and 0")
        self._places = positions(self.batch_size, self.rank, self.world)
        self._mixing = Mixing.of(self.mixing)
        if self._mixing.active and len(self._places) % 2:
            raise RecipeError(
                f"mixup and cutmix mix pairs: {len(self._places)} images a process; expected an even number "
                f"(batch size {self.batch_size}, {self.world} processes)"
            )
        if self.rendering is not None and not isinstance(self.transform, PictureTransform):
            raise RecipeError(
                f"rendering: the loader's transform is {type(self.transform).__name__}, which has one size and "
                f"strength; expected train_transform(...) or eval_transform(...)"
            )
        self._samples = _Samples(self.source, self.transform, self.max_failed_share)

    def rendered(self, rendering: Callable[[Step], Rendering]) -> StepLoader:
        """Return a loader of the same batches whose pictures are made as ``rendering`` says of each step."""
        return dataclasses.replace(self, rendering=rendering)

    def _how(self, step: Step) -> Rendering | None:
        return None if self.rendering is None else self.rendering(step)

    def _order(self, step: Step, epoch: int) -> Tensor:
        key = (step.seed, step.phase, epoch)
        if key not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()
            text = f"{self.seed}/{step.seed}/{step.phase}/{epoch}"
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
            generator = torch.Generator().manual_seed(number)
            self._orders[key] = torch.randperm(len(self.source), generator=generator)
        return self._orders[key]

    def _requests(self, step: Step, how: Rendering | None) -> list[Request]:
        requests = []
        for place in self._places:
            epoch, offset = divmod(step.index * self.batch_size + place, len(self.source))
            index = int(self._order(step, epoch)[offset]) if self.shuffle else offset
            requests.append((step.key(f"data/{self.seed}/{place}"), index, how))
        return requests

    def _stream(self, step: Step, stride: int) -> _Ahead:
        plan = _Sampler(self, step, range(step.index, max(step.total, step.index + 1), stride))
        loader = DataLoader(
            self._samples,
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_one_thread,
        )
        return _Ahead(step, stride, plan, iter(loader))

    def _fetch(self, step: Step, how: Rendering | None) -> tuple[Batch, list[Failure]]:
        if not self.workers:
            return _collate([self._samples[r] for r in self._requests(step, how)])
        ahead, stride = self._ahead, 1
        if ahead is not None:
            if dataclasses.replace(ahead.last, index=ahead.last.index + ahead.stride) == step:
                found = next(ahead.batches, None)
                if found is not None and ahead.plan.how.pop(step.index, how) == how:
                    self._ahead = dataclasses.replace(ahead, last=step)
                    return found
                stride = ahead.stride
            elif dataclasses.replace(ahead.last, index=step.index) == step and step.index > ahead.last.index:
                stride = step.index - ahead.last.index
        self._ahead = self._stream(step, stride)
        return next(self._ahead.batches)

    def __call__(self, step: Step) -> Batch:
        """Return the batch of ``step``: image [B, C, H, W], target [B] or [B, K], id; what else the transform gives.

        Raises:
            DataError: Too many broken pictures.
        """
        step = dataclasses.replace(step, turn="", rank=0)  # the batch depends on neither
        how = self._how(step)
        if self._last is None or self._last[:2] != (step, how):
            with _own_randomness():
                batch, failures = self._fetch(step, how)
                self.source.record(failures, self.max_failed_share)
                if self._mixing.active:
                    batch = self._mix(batch, step)
            self._last = (step, how, batch)
        return dict(self._last[2])

    def _mix(self, batch: Batch, step: Step) -> Batch:
        m = self._mixing
        _seed(step.key(f"mix/{self.seed}"))  # equal on all ranks: one mixing ratio and box per batch
        mix = Mixup(
            mixup_alpha=m.mixup,
            cutmix_alpha=m.cutmix,
            prob=m.prob,
            switch_prob=m.switch_prob,
            label_smoothing=m.smoothing,
            num_classes=self.num_classes or self.source.num_classes,
        )
        image, target = mix(batch["image"], batch["target"])
        return {**batch, "image": image, "target": target}


class _Sampler:
    """The requests of the steps to come, for a ``DataLoader`` that reads ahead; ``how`` by step not yet drawn."""

    def __init__(self, loader: StepLoader, step: Step, indices: range) -> None:
        self.loader, self.step, self.indices = loader, step, indices
        self.how: dict[int, Rendering | None] = {}

    def __iter__(self) -> Iterator[list[Request]]:
        for i in self.indices:
            step = dataclasses.replace(self.step, index=i)
            self.how[i] = self.loader._how(step)
            yield self.loader._requests(step, self.how[i])

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class _Ahead:
    """Batches that workers prepare: the last one drawn, the distance to the next, what is being made and how."""

    last: Step
    stride: int
    plan: _Sampler
    batches: Iterator[Any]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def batches(
    source: ImageSource,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
    max_failed_share: float = MAX_FAILED_SHARE,
) -> Iterator[Batch]:
    """Yield every readable image once, in order; only the last batch may be smaller.

    Args:
        source: Images; broken ones are skipped and noted in ``source.failed``.
        transform: Deterministic transform (``eval_transform``).
        batch_size: Images a batch.
        workers: Threads that read and decode.
        max_failed_share: Share of broken pictures above which reading stops.

    Raises:
        DataError: Too many broken pictures, or no readable one.
    """
    if batch_size < 1:
        raise RecipeError(f"batch size {batch_size}; expected at least 1")

    def read(index: int) -> Item | BrokenImage:
        try:
            sample = source[index]
        except BrokenImage as err:
            return err
        return transform(sample.image), sample.label, sample.name, []

    waiting: list[Item] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(source), batch_size):
            chunk = range(start, min(start + batch_size, len(source)))
            for got in pool.map(read, chunk) if workers else map(read, chunk):
                if isinstance(got, BrokenImage):
                    source.record([(got.name, got.reason)], max_failed_share)
                else:
                    waiting.append(got)
            while len(waiting) >= batch_size:
                yield _collate(waiting[:batch_size])[0]
                waiting = waiting[batch_size:]
    if waiting:
        yield _collate(waiting)[0]
    if len(source.failed) >= len(source):
        raise DataError(f"{source.what}: none of {len(source)} images can be read ({source.failed[0][1]})")
