"""Native (C++) and Triton code behind ``ops``; every kernel has a plain-torch reference there.

``cpu`` holds the kernels of the extension module ``_native``, which the package's build compiles where it
finds a compiler; ``gpu`` the Triton kernels. Both are optional: ``ops`` asks ``available()`` and takes the
plain path otherwise. A new kernel is one ``.inl`` file under ``native/``, an entry of the table in
``native/kernels.hpp``, a binding in ``native/module.cpp`` and a checked call in ``cpu``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["report"]


def report() -> dict[str, Any]:
    """Return which kernels are active, for ``gossamer doctor``."""
    from gossamer.kernels import cpu, gpu

    return {"native": cpu.describe(), "triton": gpu.describe(), "torch": "plain torch where no kernel is named"}
