"""Policies that make rows of discrete choices, and the REINFORCE objective that trains them.

``Policy`` is the autoregressive LSTM of SAQ's configuration generator (arXiv 2111.12273, release at 594e9c7): each
choice's embedding is the input of the next step. ``TablePolicy`` decides every place by itself: it cannot express
that choices belong together, and learns what each is worth from far fewer draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.errors import RecipeError

__all__ = ["Draw", "Policy", "TablePolicy", "contrast", "reinforce", "uniform_choices"]

START = 0.1
"""Parameters start uniformly in [-0.1, 0.1] (release)."""


@dataclass(frozen=True)
class Draw:
    """One row of choices.

    Attributes:
        choices: Index of the option taken at each decision.
        log_prob: Log-probability of the row, a scalar with gradient.
        entropy: Sum of the decisions' entropies in nats, a scalar with gradient.
        probs: Probabilities of the options [decisions, options], detached.
    """

    choices: list[int]
    log_prob: Tensor
    entropy: Tensor
    probs: Tensor


def uniform_choices(decisions: int, options: int, generator: torch.Generator) -> list[int]:
    """Return ``decisions`` independent, uniform indices below ``options``."""
    return torch.randint(options, (decisions,), generator=generator).tolist()


class Policy(nn.Module):
    """Autoregressive categorical policy: LSTM cell, linear head, softmax, embedding of the choice.

    Args:
        decisions: Length of a row.
        options: Options of every decision.
        hidden: Width of cell and embedding.
        heads: Linear heads taken in turns (2: weights and activations decided apart).

    Raises:
        RecipeError: A count below one.
    """

    baseline: Tensor

    def __init__(self, decisions: int, options: int, hidden: int = 64, heads: int = 1) -> None:
        super().__init__()
        if min(decisions, options, hidden, heads) < 1:
            raise RecipeError(
                f"policy: decisions={decisions}, options={options}, hidden={hidden}, heads={heads}; expected 1 or more"
            )
        self.decisions, self.options = decisions, options
        self.embedding = nn.Embedding(options, hidden)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, options) for _ in range(heads))
        self.register_buffer("baseline", torch.full((), torch.nan))
        self.reset(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, logits: Tensor | None = None) -> None:
        """Draw all parameters anew; ``logits`` [options] are added to those of every decision."""
        for p in self.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) * 2 * START - START)
        if logits is not None:
            for bias in (p for name, p in self.heads.named_parameters() if name.endswith("bias")):
                bias.add_(logits)
        self.baseline.fill_(torch.nan)

    def forward(self, generator: torch.Generator | None = None, row: Sequence[int] | None = None) -> Draw:
        """Sample one row; ``generator`` (CPU) is the only randomness, None takes torch's global one.

        A given ``row`` is taken instead: its log-probability and the entropies along it.
        """
        embedded = self.embedding.weight.new_zeros(1, self.embedding.embedding_dim)
        state = (torch.zeros_like(embedded), torch.zeros_like(embedded))
        choices, logs, entropies, probs = [], [], [], []
        for k in range(self.decisions):
            state = self.lstm(embedded, state)
            log_p = torch.log_softmax(self.heads[k % len(self.heads)](state[0]), dim=1)
            p = log_p.exp()
            if row is None:
                action = torch.multinomial(p.detach().cpu(), 1, replacement=True, generator=generator).view(-1)
            else:
                action = torch.tensor([row[k]])
            action = action.to(p.device)
            choices.append(int(action))
            logs.append(log_p[0, action])
            entropies.append(-(p * log_p).sum())
            probs.append(p.detach()[0])
            embedded = self.embedding(action)
        return Draw(choices, torch.cat(logs).sum(), torch.stack(entropies).sum(), torch.stack(probs))


class TablePolicy(nn.Module):
    """Independent categorical policy: one row of logits a decision, equal at the start.

    Args:
        decisions: Length of a row.
        options: Options of every decision.

    Raises:
        RecipeError: A count below one.
    """

    baseline: Tensor

    def __init__(self, decisions: int, options: int) -> None:
        super().__init__()
        if min(decisions, options) < 1:
            raise RecipeError(f"policy: decisions={decisions}, options={options}; expected 1 or more")
        self.logits = nn.Parameter(torch.zeros(decisions, options))
        self.register_buffer("baseline", torch.full((), torch.nan))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, logits: Tensor | None = None) -> None:
        """Make every decision alike again: all options equal, or ``logits`` [options]."""
        self.logits.copy_(torch.zeros(self.logits.shape[1]) if logits is None else logits)
        self.baseline.fill_(torch.nan)

    def forward(self, generator: torch.Generator | None = None, row: Sequence[int] | None = None) -> Draw:
        """As ``Policy.forward``."""
        log_p = self.logits.log_softmax(1)
        p = log_p.exp()
        if row is None:
            taken = torch.multinomial(p.detach().cpu(), 1, replacement=True, generator=generator)
        else:
            taken = torch.tensor(row)[:, None]
        log_prob = log_p.gather(1, taken.to(log_p.device)).sum()
        return Draw(taken[:, 0].tolist(), log_prob, -(p * log_p).sum(), p.detach())


def contrast(draws: Sequence[Draw], costs: Sequence[float], entropy_weight: float) -> dict[str, Tensor]:
    """Return ``reinforce``'s terms for several draws judged on the same data, each against the others' mean cost.

    What the data contribute to all costs cancels. The advantages' mean is zero, so the gradient is that of the
    expected cost also where draws were rejected by a rule that knows nothing of the costs.

    Raises:
        RecipeError: Fewer than two draws, or another number of costs.
    """
    if len(draws) < 2 or len(draws) != len(costs):
        raise RecipeError(f"policy: {len(draws)} draws and {len(costs)} costs; expected two or more, as many of both")
    total, others = sum(costs), len(costs) - 1
    gains = [d.log_prob * (c - (total - c) / others) for d, c in zip(draws, costs, strict=True)]
    entropy = torch.stack([d.entropy for d in draws]).mean()
    return {"policy": torch.stack(gains).mean(), "entropy": -entropy_weight * entropy}


def reinforce(
    policy: Policy | TablePolicy, draw: Draw, cost: float, entropy_weight: float, decay: float = 0.0
) -> dict[str, Tensor]:
    """Return the loss terms that lower the expected ``cost``: ``log p (cost - baseline)`` and ``-weight x entropy``.

    Args:
        policy: The policy; its ``baseline`` is moved.
        draw: What it drew.
        cost: What the draw cost; a number, so that nothing flows into the model that was measured.
        entropy_weight: Weight of the entropy (0 or more).
        decay: Decay of the moving average of costs that is subtracted, in [0, 1); 0: none (release). An average
            changes no expectation and lowers the variance.
    """
    held = float(policy.baseline)
    mean = cost if held != held or not decay else decay * held + (1 - decay) * cost
    advantage = cost - (held if decay and held == held else mean if decay else 0.0)
    with torch.no_grad():
        policy.baseline.fill_(mean)
    return {"policy": draw.log_prob * advantage, "entropy": -entropy_weight * draw.entropy}
