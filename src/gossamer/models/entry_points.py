"""Entry points of timm for networks of our own."""

from __future__ import annotations

import sys
from typing import Any

from timm.models import register_model
from torch import nn

__all__ = ["register"]

_OF_TIMM = ("pretrained", "cache_dir")
"""What timm passes to every entry point and these networks do not take."""


def register(name: str, kind: type[nn.Module], *, drop: tuple[str, ...] = (), **fixed: Any) -> None:
    """Let timm make ``kind(name=name, **fixed, **options)`` under ``name``.

    Args:
        name: Name of the network; the module that defines ``kind`` gets a function of this name.
        kind: Its class.
        drop: Options that it does not take and timm's callers give.
        **fixed: Options of this network; whoever makes it may give others.
    """

    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        given = {k: v for k, v in options.items() if not k.startswith((*_OF_TIMM, *drop))}
        return kind(**{"name": name, **fixed, **given})

    make.__name__, make.__module__ = name, kind.__module__
    make.__doc__ = f"Return {kind.__name__} with {fixed}."
    setattr(sys.modules[kind.__module__], name, register_model(make))
