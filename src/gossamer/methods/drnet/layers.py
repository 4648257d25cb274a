"""The network under training: one classifier at several resolutions, a predictor that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError, StateError
from gossamer.kits.qat import SHORTCUTS
from gossamer.models.contracts import replace_module
from gossamer.models.source import inherit
from gossamer.ops.routing import Resized, Routed, gumbel_noise, route, straight_through
from gossamer.ops.switchable import SwitchableNorm, only_setting, select_norms, shared_copy

__all__ = ["DynamicResolution", "give_norms", "norm_paths"]


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


class DynamicResolution(nn.Module):
    """A classifier that sees each image at the size its predictor chooses (arXiv 2106.02898, sections 3.1 and 3.2).

    In training inside ``drawing`` the choice is drawn by Gumbel noise, and every output is multiplied by its choice's
    entry (1) so that the gradient reaches the predictor; else the largest score decides. Either way the batch is split
    by size, and each part runs alone with its own norms: statistics count the images that are really routed there.

    Args:
        net: The classifier, its norms switchable by size.
        router: Images to scores [B, m].
        sizes: The m candidate sizes, largest first.
        base: The network's own size, at which images come in.
        least: Parts of fewer images use the norms' running statistics and leave them as they are.

    Attributes:
        fixed: Index of the size that all images take, while the predictor is not in use.
        shares: Share of the images that each size was measured to take; before that, all take the largest.
        dense: In drawn passes, let the choice's gradient see what the sizes not chosen would have said.
    """

    def __init__(self, net: nn.Module, router: nn.Module, sizes: Sequence[int], base: int, least: int = 2) -> None:
        super().__init__()
        self.net, self.router = net, router
        self.sizes, self.base, self.least = tuple(sizes), base, least
        self.dense = False
        self.fixed: int | None = 0
        self.shares = (1.0, *[0.0] * (len(self.sizes) - 1))
        self._draw: tuple[float, Callable[[], torch.Generator]] | None = None
        self._choice: Tensor | None = None
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
        self._choice = choice
        out = route(images, index, branches) * choice.gather(1, index[:, None])
        return out + self._unchosen(images, choice) if self.dense else out

    def _unchosen(self, images: Tensor, choice: Tensor) -> Tensor:
        """Return the sum over sizes not chosen of their logits times their entries of the choice: 0, with a gradient.

        Their passes train nothing and leave the norms' statistics alone.
        """
        with torch.no_grad(), _held(self.net):
            said = torch.stack([self.at(j, images) for j in range(len(self.sizes))], 1)
        left = choice * (choice.detach() == 0)
        return (left[:, :, None] * said).sum(1)

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
            self._draw = self._choice = None

    @property
    def draws(self) -> bool:
        """Whether a training pass draws its choices now."""
        return self._draw is not None and self.fixed is None and self.training

    def take_choice(self) -> Tensor:
        """Return the choice [B, m] of the last training pass, once.

        Raises:
            StateError: No pass has drawn one since.
        """
        if self._choice is None:
            raise StateError("drnet: no resolution was drawn; run a training pass inside drawing(...) before each read")
        choice, self._choice = self._choice, None
        return choice

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
        routed = Routed(shared_copy(self.router), branches, [str(s) for s in self.sizes], self.shares)
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
