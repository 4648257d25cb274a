"""Layers that hold several versions of themselves, one of which is active."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["SwitchableNorm", "only_setting", "select_norms", "shared_copy"]


class SwitchableNorm(nn.Module):
    """One copy of a normalisation layer for each setting of what feeds it.

    Activations at different widths or resolutions have different statistics; shared ones fit none
    (arXiv 1812.08928; arXiv 2111.12273, release, one a pair of widths; arXiv 2106.02898, one a resolution).

    Args:
        source: The layer; every copy starts as it is.
        settings: Settings of what feeds it; the first is active.
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


def select_norms(model: nn.Module, setting: Hashable) -> list[nn.Module]:
    """Make the copies for ``setting`` the active ones throughout ``model``; returns these copies.

    Raises:
        ModelError: A switchable norm has no such setting.
    """
    active = []
    for norm in [m for m in model.modules() if isinstance(m, SwitchableNorm)]:
        norm.select(setting)
        active.append(norm.versions[norm.active])
    return active


def shared_copy(model: nn.Module) -> nn.Module:
    """Return new modules around the same parameters and buffers: what trains one model changes the other."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def only_setting(model: nn.Module, setting: Hashable) -> nn.Module:
    """Return a ``shared_copy`` of ``model`` with the copies for ``setting`` as plain norms.

    Raises:
        ModelError: A switchable norm has no such setting.
    """
    again = shared_copy(model)
    for parent in list(again.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SwitchableNorm):
                child.select(setting)
                setattr(parent, name, child.versions[child.active])
    return again
