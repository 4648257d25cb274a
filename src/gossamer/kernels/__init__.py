"""Native (C++) and Triton code behind ``ops``; every kernel has a plain-torch reference there.

``cpu`` and ``adder_cpu`` call the extension module ``_native``, which the package's build compiles where it
finds a compiler; ``gpu`` and ``adder_gpu`` hold the Triton kernels. Both are optional: ``ops`` asks what takes
a tensor and goes the plain way otherwise. A new kernel is one ``.inl`` file under ``native/``, an entry of the
table in ``native/kernels.hpp``, a binding (``native/module.cpp``, ``native/adder_module.cpp``) and a checked call.
"""

from __future__ import annotations

from typing import Any

__all__ = ["report"]


def report() -> dict[str, Any]:
    """Return which kernels are active, for ``gossamer doctor``."""
    from gossamer.kernels import cpu, gpu

    return {"native": cpu.describe(), "triton": gpu.describe(), "torch": "plain torch where no kernel is named"}
