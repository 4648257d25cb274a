"""Self-contained HTML reports: one run, or several side by side."""

from __future__ import annotations

from gossamer.core.callable_module import forward_calls
from gossamer.report.build import build_report

__all__ = ["build_report"]

forward_calls(__name__)
