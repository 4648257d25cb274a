"""Exponential moving average of a model's weights, exact over resumes and structural edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["Ema"]


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if v.is_floating_point()}


class Ema:
    """``average <- decay * average + (1 - decay) * weight`` after every update of the weights.

    Args:
        decay: Share kept per step, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Adopt the model's structure: new or reshaped entries start at their present value."""
        now = _averaged(model)
        kept = {k: v for k, v in self.average.items() if k in now and v.shape == now[k].shape}
        self.average = {k: kept[k].to(v.device) if k in kept else v.detach().clone() for k, v in now.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        for name, value in _averaged(model).items():
            self.average[name].lerp_(value.detach(), 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Evaluate under the averaged weights; the present ones come back unchanged.

        Raises:
            ModelError: The model's structure is no longer the averaged one.
        """
        now = _averaged(model)
        if {k: v.shape for k, v in now.items()} != {k: v.shape for k, v in self.average.items()}:
            odd = sorted(now.keys() ^ self.average.keys()) or ["a reshaped entry"]
            raise ModelError(f"ema: the model changed since it was averaged ({odd[0]}); evaluate before finish")
        with torch.no_grad():
            kept = {k: v.detach().clone() for k, v in now.items()}
            for k, v in now.items():
                v.copy_(self.average[k])
        try:
            yield
        finally:
            with torch.no_grad():
                for k, v in now.items():
                    v.copy_(kept[k])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages; ``follow`` moves them to the model's device."""
        self.average = dict(state)
