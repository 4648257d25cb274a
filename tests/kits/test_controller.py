"""The policy: its distribution, its objective, what it learns."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import RecipeError
from gossamer.kits.controller import Policy, TablePolicy, contrast, reinforce, uniform_choices


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


@pytest.mark.parametrize("policy", [Policy(4, 3), TablePolicy(4, 3)], ids=["lstm", "table"])
def test_a_given_row_has_the_log_probability_that_it_was_drawn_with(policy: Policy | TablePolicy) -> None:
    policy.reset(_generator(2), torch.tensor([0.5, 0.0, -1.0]))
    draw = policy(_generator(3))
    again = policy(row=draw.choices)
    assert again.choices == draw.choices and torch.equal(again.probs, draw.probs)
    assert torch.equal(again.log_prob, draw.log_prob) and torch.equal(again.entropy, draw.entropy)
    assert draw.probs[0, 0] > draw.probs[0, 1] > draw.probs[0, 2]


def test_contrasted_draws_teach_within_a_rule_and_whatever_the_data_cost() -> None:
    """Rows hold exactly one 1; only that of place 2 is cheap, beneath a cost that all draws of a step share."""
    policy = TablePolicy(3, 2)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.1)
    for i in range(60):
        rng, rows = _generator(i), []
        while len(rows) < 3:
            row = policy(rng).choices
            rows += [row] if sum(row) == 1 else []
        shared = float(torch.randn((), generator=rng)) * 100
        draws = [policy(row=r) for r in rows]
        terms = contrast(draws, [shared - r[2] for r in rows], 0.0)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
    probs = policy(row=[0, 0, 1]).probs
    assert probs[2, 1] > 0.8 and probs[0, 1] < 0.3 and probs[1, 1] < 0.3


def test_contrast_is_each_draw_against_the_others() -> None:
    policy = TablePolicy(1, 2)
    draws = [policy(row=[k]) for k in (0, 1, 1)]
    terms = contrast(draws, [3.0, 1.0, 2.0], 0.5)
    expected = (1.5 * draws[0].log_prob - 1.5 * draws[1].log_prob + 0.0 * draws[2].log_prob) / 3
    assert torch.allclose(terms["policy"], expected) and torch.allclose(terms["entropy"], -0.5 * draws[0].entropy)
    with pytest.raises(RecipeError, match="1 draws and 1 costs; expected two or more"):
        contrast(draws[:1], [1.0], 0.0)


def test_uniform_choices_and_refusals() -> None:
    counts = torch.tensor(uniform_choices(3000, 4, _generator(0))).bincount()
    assert len(counts) == 4 and counts.min() > 600
    with pytest.raises(RecipeError, match="decisions=0"):
        Policy(0, 4)
