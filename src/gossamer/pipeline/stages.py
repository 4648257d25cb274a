"""Stages of a run: the dense model, the model after each phase that changed it, the finished one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gossamer.core.errors import StateError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase
from gossamer.core.stack import LASTING, Stack
from gossamer.engine.checkpoint import write_json
from gossamer.models.store import is_saved, load, save

__all__ = ["Stage", "StageFolder", "stage_title"]

_TRAINED = "trained.json"
"""Names the last stage whose phase trained the weights: from there on they may be an average."""
_PRETRAINED = "pretrained.json"
"""Names the phase whose end left the dense model, where the run trains it first."""


@dataclass(frozen=True)
class Stage:
    """One state of the model.

    Attributes:
        name: ``"dense"``, a phase name, or ``"finished"``.
        title: What a table calls it.
        folder: Saved model folder (not there for a module that only its owner can build).
        module: The model itself, for such a module.
    """

    name: str
    title: str
    folder: Path
    module: nn.Module | None = None

    def model(self) -> nn.Module:
        """Return the stage's model in evaluation mode, built from its folder where there is one."""
        return (self.module if self.module is not None else load(self.folder)).eval()


def stage_title(name: str, methods: Iterable[Method]) -> str:
    """Return the table name of a stage: the class of the method that owns the phase, or the phase."""
    owner = {type(m).__module__.rpartition(".")[0].rpartition(".")[2]: type(m).__name__ for m in methods}
    head, _, _ = name.partition(".")
    if head == "fit":
        extra = [type(m).__name__ for m in methods if m.stage == "training" and not m.touches & LASTING]
        return "fine-tuned" + (f" with {' and '.join(extra)}" if extra else "")
    return owner.get(head, name)


class StageFolder:
    """Keeps the stages of a run on disk, so that a resumed run does not lose them.

    A module that gossamer cannot rebuild (a user's own class) is kept in memory instead: after a
    resume its earlier stages are missing from the table.

    Args:
        run_dir: Run folder; stages live in ``run_dir/stages/<k>-<name>/``.
        stack: The stack of the run.
        savable: Whether the model can be rebuilt from its source.
        average: Decay of the moving average that takes the weights' place when training ends, or
            ``None``; the titles of the stages that hold it say so.
    """

    def __init__(self, run_dir: Path, stack: Stack, *, savable: bool = True, average: float | None = None) -> None:
        self.folder = run_dir / "stages"
        self.stack = stack
        self.savable = savable
        self.average = average
        self._memory: dict[str, nn.Module] = {}

    def keep(self, index: int, name: str, model: nn.Module, *, edited: bool = True) -> None:
        """Keep ``model`` as stage ``index``; ``edited`` false means that it is still the dense one."""
        path = self.folder / f"{index:02d}-{name}"
        if self.savable:
            save(model, path, stack=self.stack if edited else None)
        else:
            self._memory[path.name] = copy.deepcopy(model).cpu().eval()

    def keep_pretrained(self, index: int, dense: nn.Module) -> None:
        """Keep the dense model, which the phase at ``index`` of the plan has left."""
        self.keep(0, "dense", dense, edited=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _PRETRAINED, {"phase": index})

    def pretrained(self, phase: int) -> nn.Module | None:
        """Return the dense model if it was pretrained before the phase at ``phase`` of the plan.

        Raises:
            StateError: It was, but cannot be rebuilt.
        """
        file = self.folder / _PRETRAINED
        if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["phase"] >= phase:
            return None
        if not self.savable:
            raise StateError(
                f"{self.folder.parent}: the model was pretrained here, and only its owner can rebuild it; "
                f"start again with the pretrained model and without train.pretrain"
            )
        return next(s for s in self.stages() if s.name == "dense").model()

    def on_phase_end(self, index: int, phase: Phase, model: nn.Module) -> None:
        """Keep the model after a phase that trained something or changed the structure.

        A phase that only works on the model (a calibration) leaves nothing deployable behind: what
        it prepares becomes physical at ``finish``. Nor does a part of a training that goes on.
        """
        if phase.steps and phase.work is None and phase.ends_window:
            self.keep(index + 1, phase.name, model)
            if any("weights" in t.trains for t in phase.turns):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / _TRAINED, {"last": index + 1})

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        names = {p.name for p in self.folder.glob("[0-9][0-9]-*") if is_saved(p)} | set(self._memory)
        trained = self.folder / _TRAINED
        held = self.average is not None and trained.is_file()
        averaged = json.loads(trained.read_text(encoding="utf-8"))["last"] if held else 100
        found = []
        for entry in sorted(names):
            index, _, name = entry.partition("-")
            title = self._title(name) + (f", EMA {self.average:g}" if int(index) >= averaged else "")
            found.append(Stage(name, title, self.folder / entry, self._memory.get(entry)))
        return found

    def _title(self, name: str) -> str:
        if name in ("dense", "finished"):
            last = [type(m).__name__ for m in self.stack.methods if m.touches & LASTING]
            return "dense" if name == "dense" else " + ".join(last) or "finished"
        return stage_title(name, self.stack.methods)
