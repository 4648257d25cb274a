"""Checks of a method while it works: options, neutrality, loops, resume, what it touches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.conformance.running import (
    NotConformant,
    differing,
    example_batch,
    hand_run,
    interrupted_run,
    outputs,
    require,
    run,
    without_fit,
)
from gossamer.core.errors import GossamerError
from gossamer.core.method import STAGES, Method
from gossamer.core.schedule import Batch, Phase, Plan, Step, Turn
from gossamer.core.stack import EXCLUSIVE, LASTING, Stack
from gossamer.kits.example import MethodExample
from gossamer.kits.teacher import BLOCK_LIST, FeatureTap, bind_self, block_paths

__all__ = [
    "check_declarations",
    "check_fields",
    "check_frozen_groups",
    "check_hand_loop",
    "check_neutral",
    "check_refusals",
    "check_resume",
    "check_touches",
]

KINDS = LASTING | EXCLUSIVE | {"weights", "loss", "gradients"}
DECIDING = ("prepare", "enter", "leave", "finish")


def _options(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]


def _unchanged(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, nn.Module) else type(a) is type(b) and a == b


def check_declarations(example: MethodExample) -> None:
    """Class fields are declared with allowed values, and a method that decides edits can apply them."""
    cls: Any = type(example.method())
    require(dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass; its options must be fields")
    require(cls.__mro__[1] is Method, f"{cls.__name__}: {cls.__mro__[1].__name__} stands between Method and the method")
    hooks = {n for n, v in vars(Method).items() if callable(v) and not n.startswith("_")}
    hidden = sorted(hooks & {f.name for f in dataclasses.fields(cls)})
    require(not hidden, f"{cls.__name__}: options {hidden} hide the hooks of that name; rename them")
    require(cls.stage in STAGES, f"{cls.__name__}.stage is {cls.stage!r}; allowed are {STAGES}")
    unknown = set(cls.touches) - KINDS
    require(not unknown, f"{cls.__name__}.touches has {sorted(unknown)}; allowed are {sorted(KINDS)}")
    decides = [h for h in DECIDING if getattr(cls, h) is not getattr(Method, h)]
    require(
        not decides or cls.apply is not Method.apply, f"{cls.__name__} defines {decides} but not apply; edits need it"
    )
    require(bool(cls.__doc__), f"{cls.__name__} has no docstring")


def check_fields(example: MethodExample) -> None:
    """The constructor stores its options unchanged, and a whole run leaves them so."""
    defaults = type(example.method())()
    for f in dataclasses.fields(defaults):  # type: ignore[arg-type]
        if f.init and f.default is not dataclasses.MISSING:
            value = getattr(defaults, f.name)
            require(_unchanged(value, f.default), f"{type(defaults).__name__}(): {f.name} became {value!r}")
    method = example.method()
    before = {k: v if isinstance(v, nn.Module) else repr(v) for k, v in _options(method).items()}
    run(example, [method])
    after = {k: v if isinstance(v, nn.Module) else repr(v) for k, v in _options(method).items()}
    changed = [k for k in before if not _unchanged(before[k], after[k])]
    require(not changed, f"{type(method).__name__}: a run changed the options {changed}")


def _gradients(model: nn.Module, stack: Stack, example: MethodExample) -> dict[str, Tensor]:
    grads, batch = stack.grads(example.task.loss), example_batch(example)
    step = Step("fit", "main", 0, 1)
    grads(model.train(), batch, step, stack.groups(model)["weights"])
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_neutral(example: MethodExample) -> None:
    """In its neutral setting a method leaves outputs and gradients as the plain model's (to 1e-5)."""
    if example.neutral is None:
        return
    batch, plain = example_batch(example), example.model()
    expected = outputs(plain, batch)
    finished = run(example, [example.neutral()], plan=without_fit(example.plan)).model
    _near(outputs(finished, batch), expected, "outputs of the finished model")
    stack, model = Stack([example.neutral()]), example.model()
    bind_self(stack, model)
    model = stack.prepare(model)
    _near(outputs(model, batch), expected, "outputs of the prepared model")
    ours, theirs = _gradients(model, stack, example), _gradients(plain, Stack(), example)
    require(ours.keys() >= theirs.keys(), f"neutral: no gradients for {sorted(theirs.keys() - ours.keys())[:3]}")
    for name, value in theirs.items():
        _near(ours[name], value, f"gradient of {name}")


def _near(a: Tensor, b: Tensor, what: str) -> None:
    require(a.shape == b.shape, f"neutral: {what} have shape {tuple(a.shape)}, the plain model's {tuple(b.shape)}")
    gap = (a - b).abs().max().item()
    require(gap <= 1e-5 * max(1.0, b.abs().max().item()), f"neutral: {what} differ from the plain model's by {gap:.2g}")


def check_hand_loop(example: MethodExample) -> None:
    """A loop of one's own ends bit-equal to the engine: the engine has no private entrance."""
    by_hand, by_engine = hand_run(example), run(example)
    odd = differing(by_hand.model, by_engine.model)
    require(not odd, f"hand loop: {len(odd)} tensors differ from the engine's, first {odd[:3]}")
    require(by_hand.stack.edits == by_engine.stack.edits, "hand loop: the edit log differs from the engine's")


def check_resume(example: MethodExample) -> None:
    """A run killed after every step and resumed ends bit-equal, with the same log."""
    whole, cut = run(example), interrupted_run(example, lambda: [example.method()])
    odd = differing(whole.model, cut.model)
    require(not odd, f"resume: {len(odd)} tensors differ from the uncut run's, first {odd[:3]}")
    require(whole.stack.edits == cut.stack.edits, "resume: the edit log differs from the uncut run's")
    first = next((i for i, (a, b) in enumerate(zip(whole.rows, cut.rows, strict=False)) if a != b), None)
    require(
        first is None and len(whole.rows) == len(cut.rows),
        f"resume: {len(cut.rows)} log rows against {len(whole.rows)}; first difference in row {first}",
    )


def _token_shapes(model: nn.Module, batch: Batch) -> list[torch.Size]:
    """Return the shape of every block's output; nothing for a model that has no tokens."""
    if not any(name.rpartition(".")[2] == BLOCK_LIST for name, _ in model.named_modules()):
        return []
    with FeatureTap(model.eval(), block_paths(model), training_only=False) as tap, torch.no_grad():
        model(batch["image"])
        return [t.shape for t in tap.read().values()]


def check_touches(example: MethodExample) -> None:
    """Without training, a run changes only what the method declares in ``touches``."""
    plain, batch = example.model(), example_batch(example)
    done = run(example, plan=without_fit(example.plan))
    touches, name = type(example.method()).touches, type(example.method()).__name__
    before, after = plain.state_dict(), done.model.state_dict()
    if not touches & {"structure", "precision"}:
        odd = [k for k in before if k not in after or after[k].shape != before[k].shape]
        require(
            not odd and len(after) == len(before), f"{name} changed {odd[:3]} without touching structure or precision"
        )
    if not touches & {"structure", "precision", "weights"}:
        odd = [k for k in before if not torch.equal(before[k], after[k])]
        require(not odd, f"{name} changed the values of {odd[:3]} without touching weights")
    if "tokens" not in touches and "structure" not in touches:
        require(
            _token_shapes(done.model, batch) == _token_shapes(plain, batch), f"{name} changed the tokens undeclared"
        )
    if not touches & LASTING:
        require(not done.stack.lasting_edits(), f"{name} leaves lasting edits without touching {sorted(LASTING)}")
        hooked = [n for n, m in done.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        require(not hooked, f"{name} leaves hooks on {hooked[:3]} after finish")


class _Before(Method):
    """Copies, before a turn's update, every parameter that the turn does not train."""

    stage: ClassVar[str] = "growth"  # first in the order

    def __init__(self) -> None:
        self.stack = Stack()
        self.turns: Mapping[str, Turn] = {}
        self.frozen: list[tuple[str, nn.Parameter, Tensor]] = []

    def enter(self, model: nn.Module, phase: Phase) -> None:
        self.turns = {t.name: t for t in phase.turns}

    def before_step(self, model: nn.Module, step: Step) -> None:
        groups = self.stack.groups(model)
        idle = groups.keys() - set(self.turns[step.turn].trains)
        self.frozen = [(g, p, p.detach().clone()) for g in sorted(idle) for p in groups[g]]


class _After(Method):
    """Compares, after every method's ``after_step``."""

    stage: ClassVar[str] = "precision"  # last in the order, being last in the list

    def __init__(self, before: _Before) -> None:
        self.before = before

    def after_step(self, model: nn.Module, step: Step) -> None:
        for group, p, was in self.before.frozen:
            require(torch.equal(p, was), f"phase {step.phase!r} turn {step.turn!r} changed the frozen group {group!r}")


def check_frozen_groups(example: MethodExample) -> None:
    """A group that a turn does not train keeps its bits, through the update and every ``after_step``."""
    before = _Before()
    before.stack = stack = Stack([before, example.method(), _After(before)])
    run(example, stack)


def check_refusals(example: MethodExample) -> None:
    """A model the method cannot handle is refused with a gossamer error, or left exactly as it was."""
    stranger = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    method = example.method()
    stack = Stack([method])
    bind_self(stack, stranger)
    try:
        model = stack.prepare(stranger)
        stack.phases(Plan(example.plan))
        stack.finish(model)
    except GossamerError as err:
        require(len(str(err)) > 20 and "\n" not in str(err).strip(), f"refusal is not one clear line: {err}")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as err:
        raise NotConformant(
            f"{type(method).__name__} breaks on a strange model with {type(err).__name__}: {err}; raise ModelError"
        ) from err
