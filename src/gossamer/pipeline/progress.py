"""One line on the terminal for every finished piece of work."""

from __future__ import annotations

import time

from rich.console import Console

__all__ = ["say"]

_console = Console(stderr=True, highlight=False)
_start = time.monotonic()


def say(text: str) -> None:
    """Print ``text`` with the seconds since the program started."""
    _console.print(f"[dim]{time.monotonic() - _start:6.0f} s[/dim]  {text}")
