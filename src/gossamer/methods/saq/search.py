"""The bit-width configuration generator: draws, what they cost, and the choice among them (arXiv 2111.12273)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import RecipeError
from gossamer.cost.budget import Budget
from gossamer.kits.controller import Policy, TablePolicy
from gossamer.kits.qat import QatLayout, Widths
from gossamer.ops.liq import check_width

__all__ = [
    "UNITS", "SearchSpace", "additive_row", "budget_logits", "draw_in_band", "falling", "measured_row", "parse_target",
    "row_logits", "uniform_rows",
]  # fmt: skip

UNITS = ("relative", "mbops", "gbops")
RESNET20_MBOPS = 674.643968
"""``relative`` counts every target as this many million BOPs (ResNet-20 at 4 bits), so that the published weight of
the cost is as stiff on every model as it is there."""
DRAWS = 400
_UNIFORM = re.compile(r"^\s*([0-9]+)\s*bits?\s*$")


@dataclass(frozen=True)
class SearchSpace:
    """What the generator chooses from.

    Attributes:
        layout: The layers; those that are decided get one choice each (two, if ``share`` is off).
        choices: Candidate widths.
        share: Weights and input of a layer have the same width.
        first_last: Width of the first and last layers.
    """

    layout: QatLayout
    choices: tuple[int, ...]
    share: bool = True
    first_last: int = 8

    @property
    def decisions(self) -> int:
        """Choices to make for one configuration."""
        return len(self.layout.decided) * (1 if self.share else 2)

    def pairs(self) -> list[Widths]:
        """Return the widths (weights, input) that one layer can take."""
        same = [(b, b) for b in self.choices]
        return same if self.share else [(w, a) for w in self.choices for a in self.choices]

    def layer_choices(self) -> dict[str, list[Widths]]:
        """Return the widths that every layer can be switched to."""
        fixed = self.layout.widths(self.choices[0], self.first_last)
        free = {k.name for k in self.layout.layers if k.role in ("body", "shortcut")}
        return {name: self.pairs() if name in free else [widths] for name, widths in fixed.items()}

    def body(self, row: Sequence[int]) -> list[Widths]:
        """Return the widths of the decided layers for a row of choice indices."""
        bits = [self.choices[k] for k in row]
        return [(b, b) for b in bits] if self.share else list(zip(bits[::2], bits[1::2], strict=True))

    def widths(self, row: Sequence[int]) -> dict[str, Widths]:
        """Return the widths of all layers for a row of choice indices."""
        return self.layout.widths(self.body(row), self.first_last)

    def bops(self, row: Sequence[int]) -> int:
        """Return the bit operations of a row."""
        return self.layout.bops(self.widths(row))

    def uniform_bops(self, bits: int) -> int:
        """Return the bit operations with all decided layers at ``bits``."""
        return self.layout.bops(self.layout.widths(bits, self.first_last))


def parse_target(space: SearchSpace, text: str | float) -> float:
    """Return the target in bit operations.

    Args:
        space: What can be chosen.
        text: ``"4bit"`` (what 4 bits everywhere cost), a share of the float model, or an amount (``"674M"``).

    Raises:
        RecipeError: Unreadable, or out of the choices' reach (with the reachable range).
    """
    uniform = _UNIFORM.match(str(text))
    if uniform is not None:
        target = float(space.uniform_bops(check_width(int(uniform[1]), "saq: target_bops")))
    else:
        target = Budget.parse("bops", text).resolve(space.uniform_bops(32))
    low, high = space.uniform_bops(min(space.choices)), space.uniform_bops(max(space.choices))
    if not low <= target <= high:
        raise RecipeError(
            f"saq: target_bops={text} is {target / 1e6:.6g} M; widths {list(space.choices)} reach "
            f"{low / 1e6:.6g} M to {high / 1e6:.6g} M"
        )
    return target


def cost_term(bops: float, target: float, weight: float, unit: str) -> float:
    """Return ``weight x (BOPs - target)^2`` in the unit's squares."""
    scale = {"mbops": 1e6, "gbops": 1e9, "relative": target / RESNET20_MBOPS}[unit]
    return weight * ((bops - target) / scale) ** 2


def budget_logits(space: SearchSpace, target: float, spread: float) -> Tensor:
    """Return logits [choices] at which rows of independent draws cost ``target`` on average.

    Widths are normal around one width with deviation ``spread`` (bits). The wider, the worse the mean row at equal
    BOPs: products of widths are convex, so narrow layers cost more accuracy than wide ones at their price give back.
    """
    bits = torch.tensor(space.choices, dtype=torch.float64)
    least, most = min(space.choices), max(space.choices)
    cheapest = space.uniform_bops(least)
    wanted = least**2 + (target - cheapest) * (most**2 - least**2) / (space.uniform_bops(most) - cheapest)

    def logits(centre: float) -> Tensor:
        return torch.log_softmax(-0.5 * ((bits - centre) / spread) ** 2, 0)

    low, high = least - 4.0, most + 4.0
    for _ in range(60):
        p = logits((low + high) / 2).exp()
        mean = (p * bits**2).sum() if space.share else (p * bits).sum() ** 2
        low, high = (low, (low + high) / 2) if mean > wanted else ((low + high) / 2, high)
    return logits((low + high) / 2).float()


def uniform_rows(space: SearchSpace, target: float, band: float) -> list[list[int]]:
    """Return the rows of one width for all (apart: one for all weights, one for all inputs) in the band."""
    options = range(len(space.choices))
    each = [[k] for k in options] if space.share else [[w, a] for w in options for a in options]
    rows = [pair * (space.decisions // len(pair)) for pair in each]
    return [row for row in rows if target * (1 - band) <= space.bops(row) <= target]


def row_logits(space: SearchSpace, row: Sequence[int], spread: float) -> Tensor:
    """Return logits [decisions, choices] of widths that are normal around those of a row (deviation in bits)."""
    bits = torch.tensor(space.choices, dtype=torch.float32)
    return torch.log_softmax(-0.5 * ((bits - bits[list(row)][:, None]) / spread) ** 2, 1)


def falling(values: Sequence[float]) -> list[float]:
    """Return the sequence that never rises and is nearest to ``values`` in squares (adjacent violators pooled)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            before, more = pools.pop()
            mean, count = (before * more + mean * count) / (count + more), count + more
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def measured_row(space: SearchSpace, target: float, loss: Callable[[list[int]], float]) -> list[int]:
    """Return the row of least loss within the target, were the changes that single decisions make to add up (ours).

    Every decision is measured at every choice, all others at the widest: ``decisions x (choices - 1) + 1`` calls of
    ``loss``. (Around a uniform width that breaks the model, one decision's share drowns.) Wider cannot be
    worse: where it measures so, the two count as equal.
    """
    order = sorted(range(len(space.choices)), key=lambda k: space.choices[k])
    base = [order[-1]] * space.decisions
    start = loss(base)

    def alone(i: int) -> list[float]:
        at = [0.0 if k == base[i] else loss([*base[:i], k, *base[i + 1 :]]) - start for k in order]
        return [value for _, value in sorted(zip(order, falling(at), strict=True))]

    return additive_row(space, target, [alone(i) for i in range(space.decisions)])


def additive_row(space: SearchSpace, target: float, rise: Sequence[Sequence[float]]) -> list[int]:
    """Return the row within the target whose sum of ``rise`` [decisions, choices] is least.

    By a price of a bit operation (the knapsack's Lagrangian), then by single changes that still fit: exact but for
    what the last few BOPs would buy together.
    """
    options, step = range(len(space.choices)), 1 if space.share else 2
    picks = [(k,) for k in options] if space.share else [(w, a) for w in options for a in options]
    macs = dict.fromkeys(space.layout.decided, 0)
    for layer in space.layout.layers:
        if (owner := layer.follows or layer.name) in macs:
            macs[owner] += layer.macs
    places = list(zip(range(0, space.decisions, step), macs.values(), strict=True))

    def total(at: int, pick: Sequence[int]) -> float:
        return sum(rise[at + j][k] for j, k in enumerate(pick))

    def row_at(price: float) -> list[int]:
        def worth(at: int, count: int, pick: Sequence[int]) -> float:
            return total(at, pick) + price * count * space.choices[pick[0]] * space.choices[pick[-1]]

        return [k for at, count in places for k in min(picks, key=lambda p: worth(at, count, p))]

    low, high = 0.0, 1.0
    for _ in range(100):
        price = (low + high) / 2
        low, high = (low, price) if space.bops(row_at(price)) <= target else (price, high)
    row = row_at(high)
    while True:
        changes = [
            (total(at, p) - total(at, row[at : at + step]), [*row[:at], *p, *row[at + step :]])
            for at, _ in places
            for p in picks
        ]
        gain, better = min((c for c in changes if space.bops(c[1]) <= target), default=(0.0, row))
        if gain >= 0:
            return row
        row = better


def draw_in_band(
    policy: Policy | TablePolicy, space: SearchSpace, target: float, band: float, generator: torch.Generator
) -> tuple[list[int], bool]:
    """Return a row whose BOPs lie in ``[target (1 - band), target]`` and whether the policy drew it as it is.

    Where ``DRAWS`` draws miss the band (the release draws on for ever), the nearest of them is moved into it:
    one decision after another, whichever change comes closest.

    Raises:
        RecipeError: No change of the nearest draw leads into the band.
    """
    low = target * (1 - band)

    def miss(row: Sequence[int]) -> float:
        bops = space.bops(row)
        return max(low - bops, bops - target, 0.0)

    best: list[int] = []
    with torch.no_grad():
        for _ in range(DRAWS):
            row = policy(generator).choices
            if miss(row) == 0:
                return row, True
            best = row if not best or miss(row) < miss(best) else best
    for _ in range(4 * space.decisions):
        near = [[*best[:i], k, *best[i + 1 :]] for i in range(len(best)) for k in range(len(space.choices))]
        best = min(near, key=miss)
        if miss(best) == 0:
            return best, False
    raise RecipeError(
        f"saq: no configuration found between {low / 1e6:.6g} M and {target / 1e6:.6g} M BOPs; raise band={band:g}"
    )
