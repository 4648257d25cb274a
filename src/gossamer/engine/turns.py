"""One phase's turns made ready: who trains, how gradients are filled, when DDP carries them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gossamer.core.errors import PlanError, RunError
from gossamer.core.schedule import Batch, Phase, Step, Terms, Turn
from gossamer.core.stack import Stack, TaskLoss
from gossamer.engine.distributed import average_gradients
from gossamer.engine.seeding import seed_globals

__all__ = ["Tools", "TurnRunner", "split_batch"]


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into ``parts`` equal micro batches; what is not per image is shared.

    Raises:
        RunError: The batch does not divide.
    """
    if parts == 1:
        return [batch]
    size = next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)
    if size % parts:
        raise RunError(f"train.accumulate={parts}: a batch of {size} images does not divide; choose a divisor")
    each = size // parts

    def part(value: Any, n: int) -> Any:
        per_image = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, list)
        return value[n * each : (n + 1) * each] if per_image and len(value) == size else value

    return [{k: part(v, n) for k, v in batch.items()} for n in range(parts)]


@dataclass(frozen=True)
class Tools:
    """What every turn of a run needs.

    Attributes:
        accelerator: Device, ranks and collectives.
        stack: The methods.
        task_loss: Runs the model on a batch; returns output and loss terms.
        dtype: Autocast type, or None for full precision.
        accumulate: Micro batches per step.
        scaler: Gradient scaler (enabled for fp16 only).
    """

    accelerator: Accelerator
    stack: Stack
    task_loss: TaskLoss
    dtype: torch.dtype | None
    accumulate: int
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the precision context of a forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=self.dtype)


class _Objective(nn.Module):
    """Model and methods' networks as one module whose output is the loss terms, for DDP."""

    def __init__(self, tools: Tools, turn: Turn, model: nn.Module, extras: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.extras = nn.ModuleList(extras)
        self._objective = tools.stack.objective(tools.task_loss, turn)

    def forward(self, batch: Batch, step: Step) -> Terms:
        return self._objective(self.model, batch, step)


class TurnRunner:
    """Fills gradients for the turns of one phase.

    A phase of one turn without wrapped gradients runs through DDP. Where several turns alternate or
    a method evaluates several passes, DDP would synchronise in the middle: there every pass is local
    and the loop averages the finished gradients once.

    Args:
        tools: What every turn needs.
        phase: The phase.
        model: Model in the structure of the phase.
        extras: Networks that methods own.
        groups: Parameters by group.
    """

    def __init__(
        self,
        tools: Tools,
        phase: Phase,
        model: nn.Module,
        extras: Sequence[nn.Module],
        groups: Mapping[str, list[nn.Parameter]],
    ) -> None:
        self._tools = tools
        self._phase = phase
        params = [p for m in (model, *extras) for p in m.parameters()]
        self._all = list(dict.fromkeys([*params, *(p for ps in groups.values() for p in ps)]))
        turns = phase.turns if phase.work is None else ()
        self.trained = {t.name: [p for g in t.trains for p in groups[g] if p.requires_grad] for t in turns}
        self._ddp: nn.Module | None = None
        if tools.accelerator.num_processes > 1 and len(turns) == 1 and not tools.stack.wrappers(turns[0]):
            with self.only(turns[0]):
                self._ddp = tools.accelerator.prepare_model(_Objective(tools, turns[0], model, extras))

    @contextmanager
    def only(self, turn: Turn) -> Iterator[None]:
        """Let exactly the turn's parameters require gradients; nobody holds one on exit."""
        trained = {id(p) for p in self.trained[turn.name]}
        was = [p.requires_grad for p in self._all]
        for p in self._all:
            p.grad = None
            p.requires_grad_(id(p) in trained)
        try:
            yield
        finally:
            for p, flag in zip(self._all, was, strict=True):
                p.grad = None
                p.requires_grad_(flag)

    def fill(self, model: nn.Module, turn: Turn, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Fill and average the gradients of a turn (still scaled under fp16); returns detached terms."""
        tools, parts, ddp = self._tools, [batch], self._ddp
        plain = tools.stack.objective(tools.task_loss, turn)

        def micro(whole: Batch) -> list[Batch]:
            parts[:] = split_batch(whole, tools.accumulate)
            return parts

        def objective(module: nn.Module, part: Batch, at: Step) -> Terms:
            number = next((n for n, known in enumerate(parts) if known is part), 0)
            seed_globals(at, f"forward.{number}", per_rank=True)  # every pass of a step sees the same dropout
            with tools.autocast():
                if ddp is None:
                    return plain(module, part, at)
                last = number == len(parts) - 1
                with nullcontext() if last else tools.accelerator.no_sync(ddp):
                    return ddp(part, at)

        def backward(loss: Tensor) -> None:
            if not loss.requires_grad:
                raise PlanError(
                    f"phase {self._phase.name!r}, turn {turn.name!r}: the loss does not depend on any parameter of "
                    f"{list(turn.trains)}; let the turn train a group that its loss reaches"
                )
            tools.scaler.scale(loss).backward()

        grads = tools.stack.grads(tools.task_loss, turn, backward=backward, micro=micro, objective=objective)
        logs = grads(model, batch, step, self.trained[turn.name])
        if ddp is None:
            average_gradients(tools.accelerator, self.trained[turn.name])
        return logs

    def close(self) -> None:
        """Take the DDP hooks off the parameters."""
        if self._ddp is not None:
            self._ddp = None
            self._tools.accelerator.free_memory()
