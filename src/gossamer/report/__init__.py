"""Self-contained HTML reports: one run, or several side by side."""

from __future__ import annotations

from gossamer.report.build import build_report

__all__ = ["build_report"]
