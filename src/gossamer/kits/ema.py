"""Exponential moving average of a model's weights, exact over resumes and structural edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["Ema"]


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if v.is_floating_point()}


class Ema:
    """``average <- decay * average + (1 - decay) * weight`` after every update of the weights.

    Only what trains together with the weights is averaged, buffers included (as timm does). Everything
    else - parameters of other turns, what a method's own work writes - is adopted as it is.

    Args:
        decay: Share kept per step, in [0, 1].
        warmup: Let the share rise as (1 + n) / (10 + n) over the first updates n, up to ``decay``, so
            that an average of few updates is not the initial weights.
    """

    def __init__(self, decay: float, *, warmup: bool = False) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Adopt the model's structure.

        A tensor that is still there keeps its average, whatever its name is now (a block that moved).
        One that took the place of a vanished one of the same shape takes over its average. New and
        reshaped ones start at their present value.
        """
        now = _averaged(model)
        present = {id(t) for t in now.values()}
        by_object = {id(t): self.average[k] for k, t in self._seen.items() if k in self.average}
        gone = {k: v for k, v in self.average.items() if k not in self._seen or id(self._seen[k]) not in present}
        followed = {}
        for name, value in now.items():
            same = self._seen.get(name) is value  # a tensor with two names has two averages
            known = self.average[name] if same else by_object.get(id(value), gone.get(name))
            fits = known is not None and known.shape == value.shape
            followed[name] = known.to(value.device) if known is not None and fits else value.detach().clone()
        self.average, self._seen = followed, now

    @torch.no_grad()
    def update(self, model: nn.Module, trained: Iterable[nn.Parameter], *, adopt: bool = False) -> None:
        """Move the average of ``trained`` parameters and of buffers towards the present.

        Args:
            model: The model.
            trained: Parameters that the turn has trained.
            adopt: The turn does not train the weights: take its parameters over instead of averaging.
        """
        mine = {id(p) for p in trained}
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        for name, value in _averaged(model).items():
            if not isinstance(value, nn.Parameter):
                self.average[name].lerp_(value, 1 - decay)
            elif id(value) in mine:
                self.average[name].lerp_(value.detach(), 1.0 if adopt else 1 - decay)
        self.updates += 1

    @contextmanager
    def adopting(self, model: nn.Module) -> Iterator[None]:
        """Take over every entry of ``model`` that changes inside (a method's own work)."""
        with torch.no_grad():
            before = {k: v.detach().clone() for k, v in _averaged(model).items()}
        yield
        with torch.no_grad():
            for name, value in _averaged(model).items():
                if name not in before or not torch.equal(before[name], value):
                    self.average[name] = value.detach().clone()

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the average into ``model`` and keep the weights it held in its place.

        Raises:
            ModelError: The model's structure is no longer the averaged one.
        """
        now = self._matching(model)
        held = {k: v.detach().clone() for k, v in now.items()}  # all before any is written: some may be tied
        for name, value in now.items():
            value.copy_(self.average[name])
        self.average = held

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Evaluate under the other set of weights; the present ones come back unchanged.

        Raises:
            ModelError: The model's structure is no longer the averaged one.
        """
        self.exchange(model)
        try:
            yield
        finally:
            self.exchange(model)

    def _matching(self, model: nn.Module) -> dict[str, Tensor]:
        now = _averaged(model)
        if {k: v.shape for k, v in now.items()} != {k: v.shape for k, v in self.average.items()}:
            odd = sorted(now.keys() ^ self.average.keys()) or ["a reshaped entry"]
            raise ModelError(f"ema: the model changed since it was averaged ({odd[0]}); evaluate before finish")
        return now

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int = 0) -> None:
        """Restore the averages (and the number of updates); ``follow`` moves them to the model's device."""
        self.average, self._seen, self.updates = dict(state), {}, updates
