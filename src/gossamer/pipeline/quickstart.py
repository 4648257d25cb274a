"""The main job on embedded data: search, fine-tune, quantize, export, measure, report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from gossamer.pipeline.execute import RunResult, execute
from gossamer.pipeline.progress import say
from gossamer.recipe import Recipe

__all__ = ["quickstart"]

_QUICK = ["train.steps=1", "train.batch_size=2", "data.eval=embedded:eval[0:8]", "export.rounds=2"]


def quickstart(out: Path, *, resume: bool, quick: bool, progress: bool) -> RunResult:
    """See ``gossamer.api.quickstart``."""
    with resources.as_file(resources.files("gossamer.pipeline") / "quickstart.yaml") as path:
        recipe = Recipe.from_yaml(path, _QUICK if quick else [])
    return execute(recipe, out, resume=resume, progress=progress, say=say if progress else (lambda text: None))
