"""What a loop is told, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from gossamer.core.schedule import Batch, Phase, Terms

__all__ = ["Position", "RunOptions", "TrainTask"]


class TrainTask(Protocol):
    """What the loop asks of a task."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Any, Terms]:
        """Run the model on a batch; return its output and the loss terms."""


@dataclass(frozen=True)
class RunOptions:
    """How a run behaves towards the outside.

    Attributes:
        resume: Continue an unfinished run in the folder; starts anew where there is none.
        identity: Plain JSON that a resumed run must share with the one it continues
            (``Recipe.identity()``); default: settings, seed and the methods' options.
        quiet: No progress bars.
        dense_hook: Called with the dense model before the first method changes it.
        on_phase_end: Called with a phase's position in the plan, the phase and the model it left, on
            every rank, before the checkpoint that moves on; a resumed run may call it again.
        on_row: Called with every row that goes to ``metrics.jsonl``.
        mark_finished: Mark the folder as finished at the end of ``run``; off where the caller has
            work of its own to do in it and calls ``Checkpoints.mark_finished``.
    """

    resume: bool = False
    identity: Mapping[str, Any] | None = None
    quiet: bool = True
    dense_hook: Callable[[nn.Module], None] | None = None
    on_phase_end: Callable[[int, Phase, nn.Module], None] | None = None
    on_row: Callable[[dict[str, Any]], None] | None = None
    mark_finished: bool = True


@dataclass
class Position:
    """Where a run stands: everything a resumed loop needs besides tensors.

    Attributes:
        phase: Index of the phase.
        step: Steps of it that are done.
        entered: Whether the phase's ``enter`` edits are in the log.
        total: Steps done since the start of the run.
        seconds: Wall time of the phase: its steps, edits, checkpoints and what ``on_phase_end`` takes; the
            first phase has the start of the run too.
        cpu_seconds: Processor time of this process in the same span.
        prepared: Number of edits that ``prepare`` made.
    """

    phase: int = 0
    step: int = 0
    entered: bool = False
    total: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    prepared: int = 0
