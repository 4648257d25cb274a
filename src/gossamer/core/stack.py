"""Several methods seen as one. The engine and a user's own loop call the same functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import PlanError
from gossamer.core.method import STAGES, Edit, Grads, Method
from gossamer.core.schedule import Batch, Loader, Objective, Phase, Plan, Step, Terms, Turn

__all__ = ["EXCLUSIVE", "LASTING", "Stack", "TaskLoss"]

TaskLoss = Callable[[nn.Module, Batch], tuple[Any, Terms]]
"""Runs the model on a batch; returns its output and the task's loss terms."""
LASTING = frozenset({"tokens", "structure", "precision"})
"""What remains in a finished model; edits of methods that touch none of these are not saved."""
EXCLUSIVE = frozenset({"tokens", "precision", "adversary"})


def _check(methods: Sequence[Method]) -> None:
    for m in methods:
        if m.stage not in STAGES:
            raise PlanError(f"{type(m).__name__}: stage {m.stage!r}; allowed are {STAGES}")
    for thing in sorted(EXCLUSIVE):
        both = [type(m).__name__ for m in methods if thing in m.touches]
        if len(both) > 1:
            raise PlanError(f"{' and '.join(both)} both change the model's {thing}; keep one of them")
    for m in methods:
        for thing, gift in m.needs.items():
            others = [o for o in methods if o is not m]
            touching = [type(o).__name__ for o in others if thing in o.touches]
            if touching and not any(gift in o.gives for o in others):
                raise PlanError(
                    f"{type(m).__name__} with {touching[0]}: when {thing} change it needs {gift!r}, "
                    f"which no method of the stack gives; drop one of the two"
                )


class Stack:
    """An ordered set of methods with the hooks of one method.

    The order follows from each method's ``stage`` (recipe order within a stage).

    Raises:
        PlanError: The methods exclude each other or one lacks what it needs.
    """

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        given = list(methods)
        for m in given:
            if not isinstance(m, Method):
                raise PlanError(f"a stack takes methods; got {type(m).__name__}. Pass e.g. gossamer.DiffRate(...)")
        _check(given)
        self.methods: list[Method] = sorted(given, key=lambda m: STAGES.index(m.stage))
        self.edits: list[tuple[int, Edit]] = []

    # -- structure -------------------------------------------------------------------------------
    def _edit(self, model: nn.Module, index: int, edit: Edit | None) -> nn.Module:
        if edit is None:
            return model
        edit = json.loads(json.dumps(edit))  # what is applied is exactly what a resume will read
        model = self.methods[index].apply(model, edit)
        self.edits.append((index, edit))
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """Let every method make its first change; returns the model to train."""
        for i, m in enumerate(self.methods):
            model = self._edit(model, i, m.prepare(model))
        return model

    def enter(self, model: nn.Module, phase: Phase) -> nn.Module:
        """Start ``phase``."""
        for i, m in enumerate(self.methods):
            model = self._edit(model, i, m.enter(model, phase))
        return model

    def leave(self, model: nn.Module, phase: Phase) -> nn.Module:
        """End ``phase``."""
        for i, m in enumerate(self.methods):
            model = self._edit(model, i, m.leave(model, phase))
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Make every saving physical, in stage order: structure, then tokens, then precision."""
        for i, m in enumerate(self.methods):
            model = self._edit(model, i, m.finish(model))
        return model

    def replay(self, model: nn.Module, edits: Iterable[tuple[int, Edit]]) -> nn.Module:
        """Apply a logged list of edits to a freshly built model, in order."""
        for i, edit in edits:
            model = self._edit(model, i, edit)
        return model

    def lasting_edits(self) -> list[tuple[int, Edit]]:
        """Return the edits a saved model needs (taps and the like are left out)."""
        return [(i, e) for i, e in self.edits if self.methods[i].touches & LASTING]

    # -- schedule and data -----------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Lay down every method's phases."""
        for m in self.methods:
            plan = m.phases(plan)
        return plan

    def loader(self, name: str, loader: Loader) -> Loader:
        """Wrap a loader by every method."""
        for m in self.methods:
            loader = m.loader(name, loader)
        return loader

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return all parameter groups; ``"weights"`` is what no method claims."""
        named: dict[str, list[nn.Parameter]] = {}
        owner: dict[int, str] = {}
        for m in self.methods:
            for group, params in m.groups(model).items():
                for p in params:
                    if id(p) in owner:
                        raise PlanError(
                            f"{type(m).__name__}: a parameter of group {group!r} is already in {owner[id(p)]!r}; "
                            f"a parameter belongs to one group"
                        )
                    owner[id(p)] = group
                named.setdefault(group, []).extend(params)
        rest = [p for p in model.parameters() if id(p) not in owner]
        named["weights"] = rest + named.get("weights", [])
        return named

    # -- step ------------------------------------------------------------------------------------
    def objective(self, task_loss: TaskLoss, turn: Turn | None = None, inner: nn.Module | None = None) -> Objective:
        """Return ``f(model, batch, step) -> terms`` for a turn.

        ``inner`` is the bare module handed to the methods when ``model`` is a distributed wrapper.
        """
        turn = turn or Turn()

        def objective(model: nn.Module, batch: Batch, step: Step) -> Terms:
            if turn.objective is not None:
                return turn.objective(inner if inner is not None else model, batch, step)
            out, terms = task_loss(model, batch)
            for m in self.methods:
                new = m.loss(inner if inner is not None else model, batch, out, step)
                clash = (terms.keys() & new.keys()) - {"task"}
                if clash:
                    raise PlanError(f"{type(m).__name__}: loss terms {sorted(clash)} are already defined")
                terms = {**terms, **new}
            return terms

        return objective

    def grads(
        self,
        task_loss: TaskLoss,
        turn: Turn | None = None,
        *,
        inner: nn.Module | None = None,
        backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
        micro: Callable[[Batch], list[Batch]] = lambda batch: [batch],
        objective: Objective | None = None,
    ) -> Grads:
        """Return the function that fills ``.grad`` for a turn, wrapped by the methods it concerns.

        ``objective`` stands in for ``self.objective(...)`` where a loop runs it in its own way.
        """
        turn = turn or Turn()
        terms_of = objective or self.objective(task_loss, turn, inner)

        def grads(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Tensor]:
            parts = micro(batch)
            logs: dict[str, Tensor] = {}
            for part in parts:
                terms = terms_of(model, part, step)
                if not terms:
                    where = f"phase {step.phase!r}, turn {step.turn!r}"
                    raise PlanError(f"{where}: no loss term; the task brings none for this data, so a method must")
                total = torch.stack([t.float() for t in terms.values()]).sum()
                backward(total / len(parts))
                for k, v in terms.items():
                    logs[k] = logs.get(k, torch.zeros((), device=v.device)) + v.detach().float() / len(parts)
            return logs

        @torch.no_grad()
        def evaluate(model: nn.Module, batch: Batch, step: Step) -> Terms:
            return terms_of(model, batch, step)

        wrapped: Grads = grads
        for m in reversed(self.wrappers(turn)):
            wrapped = m.wrap_grads(wrapped, evaluate)
        return wrapped

    def wrappers(self, turn: Turn) -> list[Method]:
        """Return the methods that wrap the gradients of ``turn``, outermost first."""
        if turn.objective is not None:
            return []
        plain = Method.wrap_grads
        return [m for m in self.methods if type(m).wrap_grads is not plain and m.wraps in turn.trains]

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Call every method's ``before_step``."""
        for m in self.methods:
            m.before_step(model, step)

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Call every method's ``after_step``."""
        for m in self.methods:
            m.after_step(model, step)

    # -- evaluation, report, state ---------------------------------------------------------------
    def variants(self, model: nn.Module) -> dict[str, AbstractContextManager[None]]:
        """Return every method's evaluation variants."""
        return {name: ctx for m in self.methods for name, ctx in m.variants(model).items()}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return ``{class name: description}`` for the report."""
        return {type(m).__name__: m.describe(model) for m in self.methods}

    def state_dict(self) -> list[dict[str, Any]]:
        """Return every method's training-only state."""
        return [m.state_dict() for m in self.methods]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restore what ``state_dict`` returned."""
        for m, s in zip(self.methods, state, strict=True):
            m.load_state_dict(s)
