"""Models that send every image through one of several branches, and the choice that trains them.

The straight-through Gumbel choice is that of arXiv 1611.01144 as used in arXiv 2106.02898 (equations 8 to 11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = [
    "Deployable",
    "Resized",
    "Routed",
    "deployed",
    "every_branch",
    "gumbel_noise",
    "route",
    "straight_through",
]


def gumbel_noise(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return independent draws of the standard Gumbel distribution, float32, on the CPU.

    Args:
        shape: Shape of the result.
        generator: CPU generator; ``None`` takes torch's global one.
    """
    tiny = torch.finfo(torch.float32).tiny
    exponential = -torch.rand(tuple(shape), generator=generator).clamp_min(tiny).log()
    return -exponential.clamp_min(tiny).log()


def straight_through(scores: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return the one-hot choice of every row, with the gradient of a softmax.

    Forward: one-hot of ``argmax(scores + noise)``; with Gumbel noise, option j comes up with probability
    ``softmax(scores)[j]``. Backward: as ``softmax((scores + noise) / temperature)``.

    Args:
        scores: [B, m], unnormalised log-probabilities.
        noise: [B, m], or ``None`` for the largest score itself.
        temperature: Above 0; lower is closer to the choice and of higher variance.
    """
    noisy = scores if noise is None else scores + noise.to(scores)
    soft = F.softmax(noisy / temperature, dim=1)
    hard = F.one_hot(noisy.argmax(1), scores.shape[1]).to(soft)
    return hard + (soft - soft.detach())  # the difference is exactly 0


def route(images: Tensor, index: Tensor, branches: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run every image through its branch, one sub-batch a branch; returns the outputs in the images' order.

    A branch that no image takes is not run.

    Args:
        images: [B, ...].
        index: [B], the branch of each image.
        branches: Images [n, ...] to outputs [n, K].
    """
    rows, outs = [], []
    for j, branch in enumerate(branches):
        mine = (index == j).nonzero().flatten()
        if len(mine):
            rows.append(mine)
            outs.append(branch(images[mine]))
    return outs[0] if len(outs) == 1 else torch.cat(outs)[torch.cat(rows).argsort()]


class Resized(nn.Module):
    """A module that sees its images at a size of its own (bilinear, pixel centres aligned, no antialiasing).

    Args:
        module: The module.
        size: Height and width it sees.
    """

    def __init__(self, module: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.module = module
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return the module's output for ``images`` [B, C, H, W]."""
        return self.module(F.interpolate(images, self.size, mode="bilinear", align_corners=False))


class Routed(nn.Module):
    """A finished model whose router chooses one branch for every image.

    Attributes:
        router: Images [B, C, H, W] to scores [B, m].
        branches: m modules, images [B, C, H, W] to outputs [B, K]. They may share parameters, not modules.
        names: What to call the branches.
        shares: Share of the images that each branch was measured to take; what the ledger weighs costs by.

    Raises:
        ModelError: The numbers of branches, names and shares differ, the shares do not add up to 1, or two branches
            share a module.
    """

    def __init__(
        self, router: nn.Module, branches: Sequence[nn.Module], names: Sequence[str], shares: Sequence[float]
    ) -> None:
        super().__init__()
        if not len(branches) == len(names) == len(shares) or abs(sum(shares) - 1) > 1e-3 or min(shares) < 0:
            raise ModelError(
                f"routed model: {len(branches)} branches, names {list(names)}, shares {list(shares)}; expected one of "
                f"each a branch, and shares that add up to 1"
            )
        inside = [m for branch in branches for m in branch.modules()]
        if len(set(inside)) < len(inside):
            raise ModelError("routed model: two branches hold one module; share its tensors alone (shared_copy)")
        self.router = router
        self.branches = nn.ModuleList(branches)
        self.names, self.shares = tuple(names), tuple(float(s) for s in shares)
        self._every = False

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs [B, K] of the branches chosen; the choice is the largest score."""
        scores = self.router(images)
        if self._every:
            return [branch(images) for branch in self.branches][0]
        return route(images, scores.argmax(1), list(self.branches))


@contextmanager
def every_branch(model: nn.Module) -> Iterator[dict[nn.Module, float]]:
    """Let routed models run all their branches on all images, for whoever counts what they do.

    Yields:
        The share of the images that reach a module, for each module inside a branch.
    """
    routed = [m for m in model.modules() if isinstance(m, Routed)]
    shares: dict[nn.Module, float] = {}
    for m in routed:
        m._every = True
        for branch, share in zip(m.branches, m.shares, strict=True):
            for inner in branch.modules():
                shares[inner] = shares.get(inner, 1.0) * share
    try:
        yield shares
    finally:
        for m in routed:
            m._every = False


@runtime_checkable
class Deployable(Protocol):
    """A model under training that knows the module to export, count and time in its place."""

    def deployed(self) -> nn.Module:
        """Return that module in evaluation mode; it shares the weights of this one."""
        ...


def deployed(model: nn.Module) -> nn.Module:
    """Return what a model is in deployment: itself, unless it says otherwise."""
    return model.deployed() if isinstance(model, Deployable) else model
