"""Checkpoints on disk: atomic, exact, two kept; and the state of a run folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gossamer.core.errors import RunError, StateError
from gossamer.engine.pack import pack, unpack

__all__ = ["FORMAT", "Checkpoints", "differing_keys", "write_json"]

FORMAT = 1
"""Version of the checkpoint layout; newer ones are refused."""
_STATE, _TENSORS, _DONE = "state.json", "tensors.safetensors", "finished.json"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return ``"key: old -> new"`` for every leaf in which two nested mappings differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            found += differing_keys(
                dict(zip(map(str, range(len(a))), a, strict=True)),
                dict(zip(map(str, range(len(b))), b, strict=True)),
                f"{prefix}{key}.",
            )
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run_dir: Run folder; checkpoints live in ``run_dir/checkpoints/<phase>-<step>/``.
        keep: How many to keep.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.keep = keep

    def names(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("[0-9]*-[0-9]*") if p.is_dir())

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        found = self.names()
        return found[-1] if found else None

    def status(self) -> str:
        """Return ``"new"``, ``"unfinished"`` or ``"finished"``."""
        if (self.folder / _DONE).is_file():
            return "finished"
        started = self.latest() is not None or (self.run_dir / "metrics.jsonl").is_file()
        return "unfinished" if started else "new"

    def open(self, *, resume: bool, device: torch.device | None = None) -> dict[str, Any] | None:
        """Claim the folder; returns the state to resume from (on ``device``), or None for a new run.

        Raises:
            StateError: The folder holds a finished run, or an unfinished one and ``resume`` is off.
        """
        status = self.status()
        if status == "finished":
            raise StateError(f"{self.run_dir}: holds a finished run; choose another folder with --out")
        if status == "unfinished" and not resume:
            raise StateError(
                f"{self.run_dir}: holds an unfinished run; continue it with --resume, "
                f"or choose another folder with --out"
            )
        latest = self.latest()
        return None if latest is None else self.read(latest, device)

    def check_same_run(self, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Refuse to continue the run of ``state`` under another recipe.

        Raises:
            StateError: The identities differ; names the first keys that do.
        """
        different = differing_keys(state["identity"], identity)
        if different:
            raise StateError(
                f"{self.run_dir}: the run was started otherwise ({'; '.join(different[:5])}); "
                f"resume it with its own recipe, or choose another folder with --out"
            )

    def clear_leftovers(self) -> None:
        """Remove folders that a killed writer left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".writing-*"):
            shutil.rmtree(path)

    def write(self, phase: int, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint atomically and drop old ones.

        Raises:
            RunError: The disk refuses; earlier checkpoints stay usable.
            StateError: ``state`` holds something a checkpoint cannot.
        """
        target = self.folder / f"{phase:03d}-{step:07d}"
        if target.is_dir():
            return target
        tree, tensors = pack(dict(state))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        try:
            save_file(tensors, temporary / _TENSORS)
            text = json.dumps({"format": FORMAT, "tensor_bytes": size, "state": tree})
            (temporary / _STATE).write_text(text, encoding="utf-8")
            _sync(temporary / _TENSORS)
            _sync(temporary / _STATE)
            _sync(temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
            _sync(self.folder)
        except (OSError, SafetensorError) as err:
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            raise RunError(
                f"checkpoint {target}: cannot write {size / 2**20:.1f} MiB ({err}); {free / 2**20:.1f} MiB are free. "
                f"Free some space and continue with --resume; last good checkpoint: {self.latest()}"
            ) from err
        for old in self.names()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def read(self, path: Path, device: torch.device | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            StateError: It is of a newer format or damaged.
        """
        try:
            content = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if content["format"] > FORMAT:
                raise StateError(
                    f"checkpoint {path}: format {content['format']}, this gossamer reads up to {FORMAT}; "
                    f"upgrade gossamer"
                )
            return unpack(content["state"], load_file(path / _TENSORS), device)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
            raise StateError(
                f"checkpoint {path}: unreadable ({type(err).__name__}: {err}); "
                f"remove this folder to resume from the one before it"
            ) from err

    def mark_finished(self, facts: Mapping[str, Any]) -> None:
        """Record that nothing is left to do in this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _DONE, {"format": FORMAT, **facts})
