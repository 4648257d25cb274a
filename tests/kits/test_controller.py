"""The policy: its distribution, its objective, what it learns."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import RecipeError
from gossamer.kits.controller import Policy, reinforce, uniform_choices


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_size_of_the_published_controller() -> None:
    assert sum(p.numel() for p in Policy(18, 4).parameters()) == 33_796


def test_draws_follow_the_generator_and_probabilities_add_up() -> None:
    policy = Policy(5, 3)
    policy.reset(_generator(1))
    first, second = policy(_generator(7)), policy(_generator(7))
    assert first.choices == second.choices and torch.equal(first.log_prob, second.log_prob)
    assert torch.allclose(first.probs.sum(1), torch.ones(5))
    picked = first.probs[torch.arange(5), first.choices].log().sum()
    assert torch.allclose(first.log_prob, picked)
    expected = -(first.probs * first.probs.log()).sum()
    assert torch.allclose(first.entropy, expected)
    assert all(p.abs().max() <= 0.1 for p in policy.parameters())


def test_two_heads_take_turns() -> None:
    policy = Policy(4, 3, heads=2)
    with torch.no_grad():
        for head, bias in zip(policy.heads, (0, 2), strict=True):
            head.bias.zero_()
            head.bias[bias] = 50.0
    assert policy(_generator(0)).choices == [0, 2, 0, 2]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_policy_moves_to_the_cheaper_option(decay: float) -> None:
    policy = Policy(3, 2)
    policy.reset(_generator(0))
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.01)
    for i in range(150):
        draw = policy(_generator(i))
        terms = reinforce(policy, draw, float(draw.choices[1]), 0.001, decay)  # only decision 1 costs
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
    probs = policy(_generator(0)).probs
    assert probs[1, 0] > 0.9 and probs[1, 0] > probs[0, 0]


def test_costs_reach_the_policy_alone_and_the_baseline_follows() -> None:
    policy = Policy(2, 2)
    draw = policy(_generator(0))
    assert torch.equal(reinforce(policy, draw, 3.0, 0.0, 0.0)["policy"], 3.0 * draw.log_prob)
    policy.reset(_generator(0))
    assert float(reinforce(policy, draw, 3.0, 0.0, 0.5)["policy"]) == 0  # the first cost is its own baseline
    assert float(policy.baseline) == 3.0
    terms = reinforce(policy, draw, 5.0, 0.0, 0.5)
    assert torch.allclose(terms["policy"], 2.0 * draw.log_prob) and float(policy.baseline) == 4.0


def test_uniform_choices_and_refusals() -> None:
    counts = torch.tensor(uniform_choices(3000, 4, _generator(0))).bincount()
    assert len(counts) == 4 and counts.min() > 600
    with pytest.raises(RecipeError, match="decisions=0"):
        Policy(0, 4)
