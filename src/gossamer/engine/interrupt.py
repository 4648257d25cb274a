"""Ctrl-C and termination: finish the step, save, leave a resumable run."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from gossamer.core.errors import GossamerError

__all__ = ["Interrupted", "StopSignals"]


class Interrupted(GossamerError):
    """A run was stopped by a signal after saving a checkpoint; it can be resumed."""

    exit_code = 130


class StopSignals:
    """Context in which SIGINT and SIGTERM set ``requested`` instead of ending the process.

    A second SIGINT raises ``KeyboardInterrupt`` at once. Outside the main thread, where Python
    allows no handlers, and with ``active=False`` signals keep their meaning.
    """

    def __init__(self, *, active: bool = True) -> None:
        self.requested = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> StopSignals:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
