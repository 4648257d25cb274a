"""Triton kernels for GPUs. Importable anywhere; usable with triton and a CUDA device."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["available", "describe"]


def available() -> bool:
    """Return whether triton is installed and a GPU is there."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def describe() -> str:
    """Return whether the kernels are active, or what is missing."""
    if not torch.cuda.is_available():
        return "not active: no CUDA device"
    return "active" if available() else "not active: pip install triton"
