"""Let a package be called like the public function that shares its name."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["forward_calls"]


class _CallableModule(ModuleType):
    """A module whose call goes to a function of ``gossamer.api``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("gossamer.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


def forward_calls(package: str) -> None:
    """Make ``package`` callable: ``gossamer.cost(...)`` runs ``gossamer.api.cost(...)``.

    Importing ``gossamer.cost`` binds the package over the public function ``gossamer.cost``; with
    this both uses of the name stay right.
    """
    sys.modules[package].__class__ = _CallableModule
