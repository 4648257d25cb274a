"""The network under training: one classifier at several resolutions, a predictor that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, StateError
from gossamer.kits.norm_statistics import norms_frozen
from gossamer.kits.qat import SHORTCUTS
from gossamer.models.contracts import replace_module
from gossamer.models.source import inherit
from gossamer.ops.routing import Resized, Routed, gumbel_noise, route, straight_through
from gossamer.ops.switchable import SwitchableNorm, only_setting, select_norms, shared_copy

__all__ = ["CREDITS", "Drawn", "DynamicResolution", "Shifted", "give_norms", "norm_paths"]

CREDITS = ("chosen", "dense", "expected")
"""What the predictor learns from: see ``DynamicResolution``."""


def norm_paths(net: nn.Module, *, shared_shortcuts: bool = False) -> list[str]:
    """Return the batch norms that get private copies.

    Args:
        net: The classifier.
        shared_shortcuts: Leave out those on shortcuts, as the released code does.

    Raises:
        ModelError: No batch norm.
    """
    names = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm)]
    if not names:
        raise ModelError(
            f"drnet: {type(net).__name__} has no batch norm to keep a copy of for every resolution; expected a "
            f"convolutional network with some, or resolution_norm=False"
        )
    return [n for n in names if not (shared_shortcuts and set(n.split(".")) & set(SHORTCUTS))]


def give_norms(net: nn.Module, sizes: Sequence[int], *, shared_shortcuts: bool = False) -> nn.Module:
    """Give the batch norms of ``net`` (see ``norm_paths``) one private copy a size, in place."""
    for name in norm_paths(net, shared_shortcuts=shared_shortcuts):
        replace_module(net, name, SwitchableNorm(net.get_submodule(name), sizes))
    return net


@dataclass(frozen=True)
class Drawn:
    """What a drawn training pass leaves for the loss.

    Attributes:
        choice: One-hot rows [B, m] with the gradient of the straight-through choice.
        odds: Probabilities [B, m] that the sizes were drawn with, with their gradient.
        said: Logits [B, m, K] of all sizes, without gradient; ``None`` unless the credit is ``"expected"``.
    """

    choice: Tensor
    odds: Tensor
    said: Tensor | None = None


class Shifted(nn.Module):
    """A predictor with numbers added to its scores.

    Args:
        module: Images to scores [B, m].
        shift: The m numbers.
    """

    def __init__(self, module: nn.Module, shift: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("shift", torch.tensor(list(shift), dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [B, m] of ``images`` [B, C, H, W]."""
        return self.module(images) + self.shift


class DynamicResolution(nn.Module):
    """A classifier that sees each image at the size its predictor chooses (arXiv 2106.02898, sections 3.1 and 3.2).

    In training inside ``drawing`` the choice is drawn by Gumbel noise; else the largest score decides. Either way the
    batch is split by size, and each part runs alone with its own norms: statistics count the images that are really
    routed there. The predictor's gradient comes from the outputs, multiplied by their choice's entry (1):

    - ``credit="chosen"`` (published): of the size chosen alone;
    - ``credit="dense"``: of all sizes, summed under the choice as equation 4 writes it; those not chosen add 0;
    - ``credit="expected"`` (not of the paper): nothing is multiplied, and all sizes' outputs are left to the loss.

    Args:
        net: The classifier, its norms switchable by size.
        router: Images to scores [B, m].
        sizes: The m candidate sizes, largest first.
        base: The network's own size, at which images come in.
        least: Parts of fewer images use the norms' running statistics and leave them as they are.

    Attributes:
        fixed: Index of the size that all images take, while the predictor is not in use.
        shares: Share of the images that each size was measured to take; before that, all take the largest.
        credit: See above.
        shift: Added to the scores of the routed form (``deployed``).
    """

    def __init__(self, net: nn.Module, router: nn.Module, sizes: Sequence[int], base: int, least: int = 2) -> None:
        super().__init__()
        self.net, self.router = net, router
        self.sizes, self.base, self.least = tuple(sizes), base, least
        self.credit = CREDITS[0]
        self.shift: tuple[float, ...] | None = None
        self.fixed: int | None = 0
        self.shares = (1.0, *[0.0] * (len(self.sizes) - 1))
        self._draw: tuple[float, Callable[[], torch.Generator]] | None = None
        self._drawn: Drawn | None = None
        inherit(self, net)

    def at(self, index: int, images: Tensor) -> Tensor:
        """Return logits [n, K] of ``images`` [n, C, H, W], all of them at size ``index``."""
        size = self.sizes[index]
        select_norms(self.net, size)
        with ExitStack() as stack:
            if self.training and len(images) < self.least:
                stack.enter_context(_held(self.net))
            return self.net(images) if images.shape[-1] == size else Resized(self.net, (size, size))(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of ``images`` [B, C, H, W]."""
        if self.fixed is not None:
            return self.at(self.fixed, images)
        scores = self.router(images).float()
        branches = [partial(self.at, j) for j in range(len(self.sizes))]
        if self._draw is None or not self.training:
            return route(images, scores.argmax(1), branches)
        heat, generator = self._draw
        choice = straight_through(scores, gumbel_noise(scores.shape, generator()), heat)
        index = choice.argmax(1)
        said = None if self.credit == "chosen" else self._said(images)
        self._drawn = Drawn(choice, scores.softmax(1), said)
        out = route(images, index, branches)
        if self.credit == "expected":
            return out
        out = out * choice.gather(1, index[:, None])
        if said is None:
            return out
        left = choice * (choice.detach() == 0)  # all 0, with a gradient
        return out + (left[:, :, None] * said).sum(1)

    @torch.no_grad()
    def _said(self, images: Tensor) -> Tensor:
        """Return the logits [B, m, K] of all sizes; the passes train nothing and leave the norms' statistics alone.

        Norms use the batch's own statistics: running ones lag behind the weights, most at sizes that few images take,
        which would then look worse still.
        """
        with norms_frozen(self.net):
            return torch.stack([self.at(j, images) for j in range(len(self.sizes))], 1).float()

    @contextmanager
    def drawing(self, heat: float, generator: Callable[[], torch.Generator]) -> Iterator[None]:
        """Draw the choices of training passes inside, at temperature ``heat``.

        Every pass asks for a generator anew: the two passes of a sharpness-aware step see the same choices (and so do
        the micro batches of one step).
        """
        self._draw = (heat, generator)
        try:
            yield
        finally:
            self._draw = self._drawn = None

    @property
    def draws(self) -> bool:
        """Whether a training pass draws its choices now."""
        return self._draw is not None and self.fixed is None and self.training

    def take_drawn(self) -> Drawn:
        """Return what the last training pass drew, once.

        Raises:
            StateError: No pass has drawn one since.
        """
        if self._drawn is None:
            raise StateError("drnet: no resolution was drawn; run a training pass inside drawing(...) before each read")
        drawn, self._drawn = self._drawn, None
        return drawn

    @contextmanager
    def only(self, index: int | None) -> Iterator[None]:
        """Let all images take size ``index`` (``None``: the predictor's choice)."""
        before, self.fixed = self.fixed, index
        try:
            yield
        finally:
            self.fixed = before

    def branch(self, index: int) -> nn.Module:
        """Return the classifier at one size as a module of its own that shares the weights."""
        size = self.sizes[index]
        net = only_setting(self.net, size)
        return (net if size == self.base else Resized(net, (size, size))).eval()

    def deployed(self) -> nn.Module:
        """Return the routed form, or the classifier at its one size while the predictor is not in use."""
        if self.fixed is not None:
            return inherit(self.branch(self.fixed), self)
        branches = [self.branch(j) for j in range(len(self.sizes))]
        router = shared_copy(self.router) if self.shift is None else Shifted(shared_copy(self.router), self.shift)
        routed = Routed(router, branches, [str(s) for s in self.sizes], self.shares)
        return inherit(routed, self).eval()


@contextmanager
def _held(net: nn.Module) -> Iterator[None]:
    """Let batch norms work as in evaluation: one image may leave one value a channel, which has no variance."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training]
    for m in norms:
        m.eval()
    try:
        yield
    finally:
        for m in norms:
            m.train()
