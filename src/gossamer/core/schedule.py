"""What a run does, as data: steps, turns, phases and the plan they form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import PlanError

__all__ = ["Batch", "Loader", "Objective", "Phase", "Plan", "Step", "Terms", "Turn", "Window"]

Batch = dict[str, Any]
"""What a loader yields: ``image`` [B, C, H, W], ``target`` (class indices [B], probabilities [B, K], or pictures
[B, C, H', W']: what the task makes of them), ``id`` (list of names)."""
Terms = dict[str, Tensor]
"""Weighted scalar loss terms by name; the loop minimises their sum."""
Loader = Callable[["Step"], Batch]
"""A stateless source: the batch of a step is a function of the step alone."""
Objective = Callable[[nn.Module, Batch, "Step"], Terms]


@dataclass(frozen=True)
class Step:
    """One position in a run; the only source of randomness inside it.

    Attributes:
        phase: Name of the phase.
        turn: Name of the turn inside the step.
        index: 0-based step within the phase.
        total: Number of steps of the phase.
        seed: Seed of the run.
        rank: Rank of this process, 0 when alone.
    """

    phase: str
    turn: str
    index: int
    total: int
    seed: int = 0
    rank: int = 0

    def key(self, name: str, *, per_rank: bool = False) -> int:
        """Return a 56-bit integer that depends on seed, phase, index, ``name`` (and rank if asked)."""
        text = f"{self.seed}/{self.phase}/{self.index}/{name}/{self.rank if per_rank else '-'}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def generator(self, name: str, *, per_rank: bool = False) -> torch.Generator:
        """Return a fresh CPU generator, equal on all ranks unless ``per_rank``.

        Two calls with the same name in one step give the same stream, so a two-pass step sees
        the same draw twice, and a resumed run needs no saved generator state.
        """
        return torch.Generator().manual_seed(self.key(name, per_rank=per_rank))


@dataclass(frozen=True)
class Turn:
    """One optimiser move inside a step.

    Attributes:
        name: Name, unique in the phase.
        trains: Names of the parameter groups that receive gradients and are stepped.
        objective: Own objective; ``None`` means task loss plus every method's ``loss``.
        loader: Name of the loader that feeds it.
        every: Take the turn at steps divisible by this.
    """

    name: str = "main"
    trains: tuple[str, ...] = ("weights",)
    objective: Objective | None = None
    loader: str = "train"
    every: int = 1


@dataclass(frozen=True)
class Window:
    """The longer training of which a phase is a part: its learning rates and its data run on through the parts.

    Attributes:
        name: Name of the whole, and of its stream of batches.
        offset: Steps of the whole before this part.
        total: Steps of the whole.
    """

    name: str
    offset: int
    total: int


@dataclass(frozen=True)
class Phase:
    """A stretch of steps in which shapes, trainable groups and optimisers are constant.

    Attributes:
        name: ``"fit"`` for the recipe's own training, else ``"<method>.<what>"``.
        steps: Number of steps (for ``work``: the number of units).
        turns: The turns of each step.
        until: ``until(model)`` true ends the phase early; tested before a step.
        work: ``work(model, loaders, step)`` replaces the turns: one call is one checkpointable
            unit (a calibrated block, a federated round).
        lr: Base learning rate by group, where the phase wants other than the recipe's.
        optimizer: By group, where the phase wants other than the recipe's: ``opt`` (timm's name) and further
            options of ``timm.optim.create_optimizer_v2`` (``betas``, ``weight_decay``, ...).
        schedule: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup: Warm-up share of the steps (of the window's, where there is one), in [0, 1].
        hold: Share of the steps after the warm-up that keep the base rate before it falls, in [0, 1].
        min_lr_ratio: Final over base learning rate of the fall.
        window: The longer training that this phase is a part of; ``None``: it stands alone.
        fresh: Start with new optimisers: no moments of earlier phases.
        growing: The model is not whole yet (fewer blocks, smaller inputs): whoever compares it with another
            model, or looks for its parts by name, leaves the phase alone.
    """

    name: str
    steps: int
    turns: tuple[Turn, ...] = (Turn(),)
    until: Callable[[nn.Module], bool] | None = None
    work: Callable[[nn.Module, Mapping[str, Loader], Step], dict[str, float] | None] | None = None
    lr: Mapping[str, float] | None = None
    optimizer: Mapping[str, Mapping[str, Any]] | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    hold: float = 0.0
    min_lr_ratio: float = 0.01
    window: Window | None = None
    fresh: bool = False
    growing: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise PlanError(f"phase {self.name!r}: steps={self.steps}; expected 0 or more")
        if self.window is not None and self.work is None and self.window.offset + self.steps > self.window.total:
            raise PlanError(
                f"phase {self.name!r}: steps {self.window.offset} to {self.window.offset + self.steps} of "
                f"{self.window.name!r}, which has {self.window.total}; a part must end within the whole"
            )

    def part(self, name: str, offset: int, steps: int) -> Phase:
        """Return ``steps`` steps of this phase from ``offset`` on, as a phase of its own.

        Parts that follow one another have the learning rates and batches of the undivided phase.
        """
        whole = self.window or Window(self.name, 0, self.steps)
        return replace(self, name=name, steps=steps, window=replace(whole, offset=whole.offset + offset))

    @property
    def whole(self) -> str:
        """Name of the training that this phase is (a part of)."""
        return self.name if self.window is None else self.window.name

    @property
    def ends_window(self) -> bool:
        """Whether the training that this phase is (a part of) is over when the phase is."""
        return self.window is None or self.window.offset + self.steps >= self.window.total

    def drawn(self, step: Step) -> Step:
        """Return the step under which a loader draws the batch of ``step``: its place in the window."""
        if self.window is None:
            return step
        return replace(step, phase=self.window.name, index=self.window.offset + step.index, total=self.window.total)


class Plan(tuple[Phase, ...]):
    """Immutable list of phases; methods edit it only through these verbs.

    ``name`` matches a phase called exactly so or whose part before the first dot is ``name``.
    """

    __slots__ = ()

    def _at(self, name: str) -> list[int]:
        hits = [i for i, p in enumerate(self) if p.name == name or p.name.split(".")[0] == name]
        if not hits:
            raise PlanError(f"no phase {name!r} in the plan; phases are {[p.name for p in self]}")
        return hits

    def before(self, name: str, *new: Phase) -> Plan:
        """Insert ``new`` before the first phase that matches ``name``."""
        k = self._at(name)[0]
        return Plan((*self[:k], *new, *self[k:]))

    def after(self, name: str, *new: Phase) -> Plan:
        """Insert ``new`` after the last phase that matches ``name``."""
        k = self._at(name)[-1] + 1
        return Plan((*self[:k], *new, *self[k:]))

    def join(self, group: str, where: str) -> Plan:
        """Let every turn that trains ``where`` train ``group`` too."""

        def turn(t: Turn) -> Turn:
            return replace(t, trains=(*t.trains, group)) if where in t.trains else t

        return Plan(replace(p, turns=tuple(turn(t) for t in p.turns)) for p in self)

    def swap(self, name: str, make: Callable[[Phase], list[Phase]]) -> Plan:
        """Replace every phase that matches ``name`` by the phases ``make`` returns for it."""
        hits = set(self._at(name))
        return Plan(q for i, p in enumerate(self) for q in (make(p) if i in hits else [p]))
