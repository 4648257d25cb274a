"""gossamer makes vision models smaller, faster and cheaper to train, and proves it by measuring.

The public names are the functions and classes of ``__all__`` and every registered method
(``gossamer.DiffRate``, ``gossamer.PTQViT``, ...), all loaded on first use.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

__version__ = metadata.version("gossamer")

_HOME = {
    "Batch": "gossamer.core.schedule",
    "GossamerError": "gossamer.core.errors",
    "Method": "gossamer.core.method",
    "Phase": "gossamer.core.schedule",
    "Plan": "gossamer.core.schedule",
    "Recipe": "gossamer.recipe",
    "Runner": "gossamer.export.runner",
    "Stack": "gossamer.core.stack",
    "Step": "gossamer.core.schedule",
    "Turn": "gossamer.core.schedule",
    "bench": "gossamer.api",
    "compress": "gossamer.api",
    "cost": "gossamer.api",
    "doctor": "gossamer.api",
    "evaluate": "gossamer.api",
    "export": "gossamer.api",
    "load": "gossamer.api",
    "methods": "gossamer.api",
    "plan": "gossamer.api",
    "quickstart": "gossamer.api",
    "report": "gossamer.api",
    "run": "gossamer.api",
    "save": "gossamer.api",
    "upscale": "gossamer.api",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if not name.startswith("_"):
        registry = import_module("gossamer.core.registry")
        if any(name == entry.cls for entry in registry.methods().values()):
            return registry.find(name)
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    registry = import_module("gossamer.core.registry")
    return sorted([*__all__, *(entry.cls for entry in registry.methods().values())])
