"""How much a unit matters: what the loss would lose with it, how large its weights are, or chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.core.errors import RecipeError, nearest
from gossamer.kits.structure.regions import Structure, unit_sums

__all__ = ["CRITERIA", "Scores", "gradient_scores", "magnitude_scores", "random_scores"]

Scores = dict[str, Tensor]
"""By structure: one number a unit, float64 [units]; the larger, the more it matters."""
CRITERIA = ("fisher_group", "taylor_elem", "magnitude", "random")


@torch.no_grad()
def gradient_scores(
    weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], structures: Sequence[Structure], criterion: str
) -> Scores:
    """Return what one batch says about every unit.

    ``"fisher_group"``: with the empirical Fisher matrix, the loss changes by about ``(sum g w)^2`` when the
    weights of a unit are set to zero together (NViT, arXiv 2110.04869, eq. 6-7; release method 23): the
    square is taken of the sum over all its weights. ``"taylor_elem"``: ``sum (g w)^2``, which leaves out
    how they work together (arXiv 1906.10771; release method 22). Means over batches are the caller's.
    Numbers that are not finite (an overflow under fp16) count as 0, as in the release.

    Args:
        weights: Parameters by name.
        grads: Their gradients; a missing one counts as 0.
        structures: What to score.
        criterion: One of the two.

    Raises:
        RecipeError: Another criterion.
    """
    if criterion not in CRITERIA[:2]:
        raise RecipeError(f"criterion {criterion!r}; allowed are {CRITERIA[:2]}{nearest(criterion, CRITERIA[:2])}")
    names = {r.tensor for s in structures for r in s.scores}
    products = {
        n: weights[n].detach() * grads[n] if n in grads else torch.zeros_like(weights[n]) for n in sorted(names)
    }
    if criterion == "taylor_elem":
        products = {n: x.square() for n, x in products.items()}
    scores = {}
    for s in structures:
        found = unit_sums(products, s.scores).double()
        found = (found / s.divisor).square() if criterion == "fisher_group" else found
        scores[s.name] = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0).cpu()
    return scores


@torch.no_grad()
def magnitude_scores(weights: Mapping[str, Tensor], structures: Sequence[Structure], *, mean: bool = True) -> Scores:
    """Return the squared weights of every unit.

    Args:
        weights: Parameters by name.
        structures: What to score.
        mean: Mean over the unit's weights, so that structures of different size can be ranked together;
            else their sum.
    """
    names = {r.tensor for s in structures for r in s.scores}
    squares = {n: weights[n].detach().double().square() for n in sorted(names)}
    scores = {}
    for s in structures:
        size = sum(weights[r.tensor].numel() // r.units for r in s.scores) if mean else 1
        scores[s.name] = (unit_sums(squares, s.scores) / size).cpu()
    return scores


def random_scores(structures: Sequence[Structure], generator: torch.Generator) -> Scores:
    """Return uniform random numbers in [0, 1)."""
    return {s.name: torch.rand(s.units, generator=generator, dtype=torch.float64) for s in structures}
