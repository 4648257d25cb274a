"""The suite itself: a sound toy passes, and every kind of fault is caught by its check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from gossamer.conformance import CHECKS, NotConformant, check_method
from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Turn
from gossamer.kits.example import MethodExample

SOUND = [c for c in CHECKS if c not in ("saved", "export")]
"""A toy is not registered, so a saved model could not name it; the rooms' own runs cover these two."""


@dataclass
class Shrink(Method):
    """A sound toy: decays the first block's weights towards a searched level, then stops."""

    rate: float = 0.5
    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"weights", "loss"})
    _level: float = field(default=0.0, init=False, repr=False)

    def prepare(self, model: nn.Module) -> dict[str, Any] | None:
        return {"level": 0.0}

    def leave(self, model: nn.Module, phase: Phase) -> dict[str, Any] | None:
        return {"level": float(model.head.weight.detach().mean())} if phase.name == "fit" else None

    def apply(self, model: nn.Module, edit: dict[str, Any]) -> nn.Module:
        self._level = edit["level"]
        return model

    def loss(self, model: nn.Module, batch: Any, out: Tensor, step: Any) -> dict[str, Tensor]:
        draw = torch.rand((), generator=step.generator("shrink"))
        return {"shrink": self.rate * draw * out.square().mean()}


def case(cls: type[Method], **fields: Any) -> MethodExample:
    return MethodExample(method=lambda: cls(**fields), neutral=lambda: cls(**{**fields, "rate": 0.0}))


@pytest.mark.parametrize("check", SOUND)
def test_a_sound_method_passes(check) -> None:
    CHECKS[check](case(Shrink))


class Forgets(Shrink):
    """Counts steps outside its state: not resumable."""

    def after_step(self, model: nn.Module, step: Any) -> None:
        self._level += 1.0
        with torch.no_grad():
            model.head.bias.add_(1e-3 * self._level)


class Random(Shrink):
    """Draws from a global generator."""

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            model.head.bias.add_(torch.rand(()))
        return {"level": 0.0}


class Thaws(Shrink):
    """Changes weights in a turn that trains nothing of the kind."""

    def phases(self, plan: Any) -> Any:
        turn = Turn(objective=lambda m, b, s: {"own": m(b["image"]).mean()}, trains=("arch",))
        return plan.before("fit", Phase("search", 1, (turn,)))

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        return {"arch": [model.head.bias]}

    def after_step(self, model: nn.Module, step: Any) -> None:
        if step.phase == "search":
            with torch.no_grad():
                model.cls_token.add_(1e-3)


class Reassigns(Shrink):
    """Rewrites its own option."""

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        self.rate = 0.25
        return {"level": 0.0}


class Undeclared(Shrink):
    """Changes weights without saying so."""

    touches: ClassVar[frozenset[str]] = frozenset({"loss"})

    def finish(self, model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            model.head.bias.add_(1.0)
        return {"level": 0.0}


class Hooked(Shrink):
    """Leaves a hook behind."""

    def apply(self, model: nn.Module, edit: dict[str, Any]) -> nn.Module:
        if not model.head._forward_hooks:
            model.head.register_forward_hook(lambda m, a, out: out * 1.5)
        return model


class Breaks(Shrink):
    """Falls over a model it does not know."""

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        return {"level": float(model.head.weight.detach().mean())}


class Kinds(Shrink):
    """Declares a kind of change that does not exist."""

    touches: ClassVar[frozenset[str]] = frozenset({"everything"})


class HiddenStructure(Shrink):
    """Changes the structure outside its edits."""

    def finish(self, model: nn.Module) -> dict[str, Any]:
        model.extra_head = nn.Linear(2, 2)
        return {"level": 0.0}


@pytest.mark.parametrize(
    ("cls", "check", "says"),
    [
        (Forgets, "resume", "tensors differ"),
        (Thaws, "frozen_groups", "frozen group 'weights'"),
        (Reassigns, "fields", "changed the options \\['rate'\\]"),
        (Undeclared, "touches", "without touching weights"),
        (Hooked, "neutral", "outputs of the"),
        (Hooked, "touches", "leaves hooks"),
        (Breaks, "refusals", "AttributeError"),
        (Kinds, "declarations", "everything"),
        (HiddenStructure, "replay", "extra_head"),
        (Random, "hand_loop", "differ"),
    ],
)
def test_faults_are_caught(cls, check, says) -> None:
    # the faulty toys inherit for brevity; a method may not, so their bodies are merged into one class
    plain = type(cls.__name__, (Method,), {**vars(Shrink), **vars(cls)})
    with pytest.raises(NotConformant, match=says):
        CHECKS[check](MethodExample(method=plain, neutral=lambda: plain(rate=0.0)))


def test_unknown_check_names_are_refused() -> None:
    with pytest.raises(NotConformant, match="skip names \\['resum'\\]"):
        check_method(case(Shrink), skip=["resum"])
    assert check_method(case(Shrink), skip=[c for c in CHECKS if c != "declarations"]) == ["declarations"]
