"""What one inner step of an operator is made of: a product and an addition, unless it is registered here.

``torch.utils.flop_counter`` counts how often an operator takes its inner step, at two operations each; whether one
of them is a multiplication it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.flop_counter import register_flop_formula

__all__ = ["StepKind", "register_steps", "steps_of"]


class StepKind(NamedTuple):
    """Operations of one inner step."""

    multiplications: int
    additions: int


MULTIPLY_ACCUMULATE = StepKind(1, 1)
_KINDS: dict[Any, StepKind] = {}


def register_steps(op: Any, count: Callable[..., int], kind: StepKind) -> None:
    """Let counters know an operator.

    Args:
        op: Operator packet, ``torch.ops.<library>.<name>``.
        count: Number of inner steps from the shapes of the operator's tensors and its other arguments.
        kind: What one step is made of.
    """

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * count(*args, **kwargs)

    register_flop_formula(op)(flops)
    _KINDS[op] = kind


def steps_of(op: Any) -> StepKind:
    """Return what one inner step of a counted operator is made of."""
    return _KINDS.get(op, MULTIPLY_ACCUMULATE)
