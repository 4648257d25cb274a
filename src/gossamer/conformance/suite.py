"""The checks by name, and the functions that run them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from gossamer.conformance.finished import check_export, check_replay, check_saved
from gossamer.conformance.protocol import (
    check_declarations,
    check_fields,
    check_frozen_groups,
    check_hand_loop,
    check_neutral,
    check_refusals,
    check_resume,
    check_touches,
)
from gossamer.conformance.running import (
    NotConformant,
    differing,
    example_batch,
    interrupted_run,
    outputs,
    require,
    run,
)
from gossamer.core.errors import GossamerError
from gossamer.core.method import Method
from gossamer.core.stack import Stack
from gossamer.kits.example import MethodExample
from gossamer.kits.teacher import bind_self

__all__ = ["CHECKS", "NotConformant", "check_method", "check_pair", "fits"]

CHECKS: Mapping[str, Callable[[MethodExample], None]] = {
    "declarations": check_declarations,
    "fields": check_fields,
    "neutral": check_neutral,
    "hand_loop": check_hand_loop,
    "resume": check_resume,
    "touches": check_touches,
    "frozen_groups": check_frozen_groups,
    "refusals": check_refusals,
    "replay": check_replay,
    "saved": check_saved,
    "export": check_export,
}
"""What every method must keep, by name."""


def check_method(example: MethodExample, skip: Sequence[str] = ()) -> list[str]:
    """Run all checks on an example; returns the names of those that passed.

    Args:
        example: A small case of the method.
        skip: Names of checks to leave out (gossamer's own rooms leave out none).

    Raises:
        NotConformant: The first rule that is broken.
    """
    unknown = set(skip) - CHECKS.keys()
    require(not unknown, f"skip names {sorted(unknown)}; checks are {sorted(CHECKS)}")
    passed = []
    for name, check in CHECKS.items():
        if name not in skip:
            check(example)
            passed.append(name)
    return passed


def fits(first: MethodExample, second: MethodExample) -> bool:
    """Whether two methods may share a stack and both take the model of ``first``."""
    try:
        stack, model = Stack([first.method(), second.method()]), first.model()
        bind_self(stack, model)
        stack.prepare(model)
    except GossamerError:
        return False
    return True


def check_pair(first: MethodExample, second: MethodExample) -> None:
    """Two methods in one stack run, resume exactly, and end in a finite model that replays.

    The model, the plan and the loaders are those of ``first``.

    Raises:
        NotConformant: They do not work together.
        PlanError: Their declarations exclude each other.
    """

    def both() -> list[Method]:
        return [first.method(), second.method()]

    whole = run(first, both())
    out = outputs(whole.model, example_batch(first))
    require(bool(torch.isfinite(out).all()), "pair: the finished model's outputs are not finite")
    cut = interrupted_run(first, both)
    odd = differing(whole.model, cut.model)
    require(not odd, f"pair: {len(odd)} tensors differ after cutting and resuming, first {odd[:3]}")
