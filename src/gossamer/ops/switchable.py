"""Layers that hold several versions of themselves, one of which is active."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["SwitchableNorm"]


class SwitchableNorm(nn.Module):
    """One copy of a normalisation layer for each setting of the layer that feeds it.

    Activations at different widths have different statistics; shared ones fit none (arXiv 1812.08928;
    arXiv 2111.12273, release, one a pair of widths).

    Args:
        source: The layer; every copy starts as it is.
        settings: Settings of the feeding layer; the first is active.
    """

    def __init__(self, source: nn.Module, settings: Sequence[Hashable]) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.versions = nn.ModuleList(copy.deepcopy(source) for _ in self.settings)
        self.active = 0

    def select(self, setting: Hashable) -> None:
        """Make the copy for ``setting`` the active one.

        Raises:
            ModelError: No such setting.
        """
        if setting not in self.settings:
            raise ModelError(f"SwitchableNorm: setting {setting}; it holds {self.settings}")
        self.active = self.settings.index(setting)

    def forward(self, x: Tensor) -> Tensor:
        """Return the active copy's output."""
        return self.versions[self.active](x)
