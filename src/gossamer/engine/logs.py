"""What a run writes down while it works: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Logs"]


class Logs:
    """Writer of one process's logs; writes nothing unless ``main``.

    Args:
        run_dir: Run folder, or None for no files.
        main: Whether this is rank 0.
        quiet: No progress bar.
        on_row: Called with every row, files or not.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        main: bool = True,
        quiet: bool = True,
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._dir = Path(run_dir) if run_dir is not None and main else None
        self._on_row = on_row if main else None
        self._file: Any = None
        self._board: Any = None
        self._bar: Progress | None = None
        self._task: Any = None
        if main and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            console = Console(stderr=True)
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)

    def open(self, *, position: int = 0, total: int = 0) -> None:
        """Open the files; ``metrics.jsonl`` is cut to ``position`` bytes, TensorBoard to ``total`` steps."""
        if self._bar is not None:
            self._bar.start()
        if self._dir is None:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / "metrics.jsonl"
        path.touch()
        os.truncate(path, min(position, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import; only runs with a folder need it

        self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=total)

    def position(self) -> int:
        """Return the length in bytes of what is safely on disk."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def phase(self, name: str, steps: int, done: int) -> None:
        """Start the bar of a phase."""
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=steps, completed=done, note="")

    def row(self, row: dict[str, Any], total: int) -> None:
        """Write one row; ``total`` is the number of steps since the start of the run."""
        if self._on_row is not None:
            self._on_row(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
        if self._board is not None and "terms" in row:
            self._scalars(f"{row['phase']}/{row['turn']}", {**row["terms"], "seconds": row["seconds"]}, total)
            self._scalars("lr", row.get("lr", {}), total)

    def _scalars(self, prefix: str, values: Mapping[str, float], total: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{prefix}/{name}", value, total)

    def advance(self, terms: Mapping[str, float]) -> None:
        """Move the bar by one step and show the terms."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note="  ".join(f"{k} {v:.4g}" for k, v in terms.items()))

    def close(self) -> None:
        """Close files and bar."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self._file = self._board = None

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
