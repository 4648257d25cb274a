"""Running an example: by the engine, by hand, cut and resumed; and comparing what comes out."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from gossamer.core.method import Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.engine.loop import Loop, RunOptions
from gossamer.engine.optim import rate_factor
from gossamer.kits.example import MethodExample
from gossamer.kits.teacher import bind_self
from gossamer.recipe import TrainSettings

__all__ = [
    "NotConformant",
    "Outcome",
    "differing",
    "example_batch",
    "hand_run",
    "interrupted_run",
    "outputs",
    "replayed",
    "require",
    "run",
    "without_fit",
]

SETTINGS = TrainSettings(lr=1e-3, weight_decay=0.0, schedule="constant", checkpoint_every=1)


class NotConformant(AssertionError):
    """A method breaks the protocol; the message says which rule and where."""


def require(condition: bool, message: str) -> None:
    """Raise ``NotConformant`` unless ``condition`` holds."""
    if not condition:
        raise NotConformant(message)


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        model: The finished model, in evaluation mode.
        stack: The stack that made it.
        rows: Rows of the log without times.
    """

    model: nn.Module
    stack: Stack
    rows: list[dict[str, Any]]


def example_batch(example: MethodExample) -> Batch:
    """Return the example's first training batch."""
    return example.loaders["train"](Step("conformance", "main", 0, 1))


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [B, K] of a model in evaluation mode; its training flag stays."""
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(batch["image"])
    model.train(was)
    return out


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Return the names of state-dict entries that are not bit-equal (or not on both sides)."""
    ours, theirs = a.state_dict(), b.state_dict()
    return sorted(k for k in ours.keys() | theirs.keys() if not _same(ours.get(k), theirs.get(k)))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def without_fit(plan: Sequence[Phase]) -> tuple[Phase, ...]:
    """Return the recipe's own phases with no steps, so that only what methods do shows."""
    return tuple(replace(p, steps=0) for p in plan)


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds", "time", "total")}


def run(
    example: MethodExample,
    methods: Iterable[Method] | Stack | None = None,
    *,
    plan: Sequence[Phase] | None = None,
) -> Outcome:
    """Run an example by the engine, from the dense model to the finished one.

    Args:
        example: The example.
        methods: Methods or a stack to run instead of the example's own.
        plan: The recipe's own phases instead of the example's.
    """
    stack = methods if isinstance(methods, Stack) else Stack([example.method()] if methods is None else methods)
    rows: list[dict[str, Any]] = []
    loop = _loop(example, stack, plan, None, RunOptions(on_row=rows.append))
    return Outcome(loop.run(example.model()), stack, [_logged(r) for r in rows])


def _loop(
    example: MethodExample, stack: Stack, plan: Sequence[Phase] | None, folder: Path | None, options: RunOptions
) -> Loop:
    options = replace(options, dense_hook=lambda dense: bind_self(stack, dense))
    phases = example.plan if plan is None else plan
    return Loop(stack, example.task, example.loaders, phases, settings=SETTINGS, run_dir=folder, options=options)


class _Cut(Exception):
    pass


def interrupted_run(example: MethodExample, make: Callable[[], Sequence[Method]]) -> Outcome:
    """Run an example that is killed after every step and resumed by a new process's worth of objects."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = True
        while True:
            seen: set[tuple[str, Any]] = set()

            def cut(row: dict[str, Any], seen: set[tuple[str, Any]] = seen) -> None:
                seen.add((row["phase"], row.get("step", "end")))  # a step may log a row for each of its turns
                if len(seen) > 1:  # the first step is saved; the second one's work is lost
                    raise _Cut

            stack = Stack(make())
            torch.manual_seed(1234)  # whatever draws from a global generator shows
            loop = _loop(example, stack, None, folder, RunOptions(resume=not first, on_row=cut))
            first = False
            try:
                model = loop.run(example.model())
            except _Cut:
                continue
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return Outcome(model, stack, [_logged(json.loads(line)) for line in lines])


def hand_run(example: MethodExample) -> Outcome:
    """Run an example by a loop of one's own: no engine, only the stack's public functions."""
    stack, model = Stack([example.method()]), example.model()
    bind_self(stack, model)
    model = stack.prepare(model)
    loaders = {k: stack.loader(k, v) for k, v in example.loaders.items()}
    optimisers: dict[str, torch.optim.Optimizer] = {}
    for phase in stack.phases(Plan(example.plan)):
        model = stack.enter(model, phase)
        _hand_phase(stack, model, phase, loaders, optimisers, example)
        model = stack.leave(model, phase)
    return Outcome(stack.finish(model).eval(), stack, [])


def _hand_phase(
    stack: Stack,
    model: nn.Module,
    phase: Phase,
    loaders: dict[str, Loader],
    optimisers: dict[str, torch.optim.Optimizer],
    example: MethodExample,
) -> None:
    groups = stack.groups(model)
    for name in {g for t in phase.turns for g in t.trains} if phase.work is None else set():
        old = {} if phase.fresh or name not in optimisers else optimisers[name].state
        own = {"opt": "adamw", "weight_decay": 0.0, **(phase.optimizer or {}).get(name, {})}
        optimisers[name] = create_optimizer_v2([{"params": groups[name]}], lr=SETTINGS.lr, **own)
        optimisers[name].state.update({p: old[p] for p in groups[name] if p in old})  # moments stay with their weights
    for i in range(phase.steps):
        if phase.until is not None and phase.until(model):
            break
        if phase.work is not None:
            phase.work(model.eval(), loaders, Step(phase.name, "work", i, phase.steps))
            continue
        for turn in phase.turns:
            if i % turn.every:
                continue
            step = Step(phase.name, turn.name, i, phase.steps)
            params = [p for g in turn.trains for p in groups[g]]
            everything = [p for ps in groups.values() for p in ps]
            was = [p.requires_grad for p in everything]
            for p in everything:
                p.requires_grad_(any(p is q for q in params))
            grads = stack.grads(example.task.loss, turn)
            grads(model.train(), loaders[turn.loader](phase.drawn(step)), step, params)
            stack.before_step(model, step)
            for g in turn.trains:
                opt = optimisers[g]
                for pg in opt.param_groups:
                    pg["lr"] = (phase.lr or {}).get(g, SETTINGS.lr) * rate_factor(phase, i)
                opt.step()
                opt.zero_grad()
            for p, flag in zip(everything, was, strict=True):
                p.requires_grad_(flag)
            stack.after_step(model, step)


def replayed(example: MethodExample, edits: Sequence[tuple[int, dict[str, Any]]]) -> tuple[nn.Module, Stack]:
    """Return a dense model that went through ``edits``, read back from JSON, with a fresh stack."""
    stack, model = Stack([example.method()]), example.model()
    bind_self(stack, copy.deepcopy(model))
    log = [(i, e) for i, e in json.loads(json.dumps(list(edits)))]
    return stack.replay(model, log).eval(), stack
