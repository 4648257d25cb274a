"""What arithmetic costs in energy: an estimate from a published table, for comparing kinds of arithmetic.

Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm, 0.9 V: picojoules of one operation. Memory traffic, which
often costs more, and control are left out; silicon that has no adder array saves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from gossamer.ops.steps import StepKind

__all__ = ["PICOJOULES", "energy_pj", "operation_table"]

PICOJOULES = {
    "float32": {"multiplication": 3.7, "addition": 0.9},
    "float16": {"multiplication": 1.1, "addition": 0.4},
    "int32": {"multiplication": 3.1, "addition": 0.1},
    "int8": {"multiplication": 0.2, "addition": 0.03},
}
"""Picojoules of one operation, by type."""
_INTEGER_BITS, _HALF_BITS = 8, 16


class Counted(Protocol):
    """What ``operation_table`` needs of a cost."""

    @property
    def macs(self) -> int:
        """Multiplications per image, each with an addition."""

    @property
    def additions(self) -> int:
        """Additions per image."""


def _types(weight_bits: int, input_bits: int) -> tuple[str, str]:
    """Return the type of the operands and that of the sums."""
    widest = max(weight_bits, input_bits)
    if widest <= _INTEGER_BITS:
        return "int8", "int32"
    return ("float16", "float16") if widest <= _HALF_BITS else ("float32", "float32")


def energy_pj(kind: StepKind, weight_bits: int, input_bits: int) -> float:
    """Return the picojoules of one inner step: its last addition goes into the sum, the rest is done on operands.

    Widths up to 8 bits count as int8 with sums in int32; fewer bits count as 8.
    """
    operand, total = (PICOJOULES[t] for t in _types(weight_bits, input_bits))
    inner = kind.multiplications * operand["multiplication"] + (kind.additions - 1) * operand["addition"]
    return inner + total["addition"]


def operation_table(costs: Iterable[tuple[str, Counted]]) -> list[dict[str, Any]]:
    """Return rows (model, width, multiplications, additions, microjoules an image), each model at 32 and at 8 bits.

    Additions beyond one for each multiplication come in pairs: a difference, and its magnitude summed.

    Args:
        costs: Names and costs of models.
    """
    rows = []
    for name, cost in costs:
        products, differences = cost.macs, (cost.additions - cost.macs) // 2
        for label, bits in (("32-bit float", 32), ("8-bit integer", 8)):
            energy = products * energy_pj(StepKind(1, 1), bits, bits)
            energy += differences * energy_pj(StepKind(0, 2), bits, bits)
            rows.append(
                {
                    "model": name, "width": label, "multiplications": products, "additions": cost.additions,
                    "energy_uj": round(energy * 1e-6, 3),
                }
            )  # fmt: skip
    return rows
