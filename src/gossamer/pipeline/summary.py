"""Writes report.json: all a report shows, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.engine.checkpoint import write_json
from gossamer.pipeline.setup import Setup
from gossamer.pipeline.stages import StageFolder
from gossamer.report.photos import photo_maps

__all__ = ["DESCRIBED", "write_summary"]

DESCRIBED = "methods.json"
"""What the methods say of the run, written when training ends: a resumed run has lost their state by then."""


def _facts(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chosen = next((r for r in table if r.get("chosen")), table[-1])
    return {"fastest": f"{chosen['stage']} in {chosen['runtime']}, {chosen['precision']}"}


def write_summary(setup: Setup, keeper: StageFolder, table: Sequence[dict[str, Any]], run_dir: Path) -> Path:
    """Write ``run_dir/report.json`` and return its path.

    Args:
        setup: The run's objects.
        keeper: The stages.
        table: The measured rows.
        run_dir: Run folder.
    """
    described = json.loads((run_dir / DESCRIBED).read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for parts in described.values():
        for key in ("tokens", "quantization"):
            if parts.get(key):
                merged[key] = parts[key]
    photos, gallery = [], []
    if setup.evaluation is not None:
        photos = photo_maps(keeper.stages(), setup.evaluation, setup.preprocessing, count=6)
        gallery = setup.task.gallery(keeper.stages(), setup.evaluation, setup.preprocessing)
    content = {
        "title": setup.recipe.name,
        "summary": _facts(table),
        "environment": json.loads((run_dir / "environment.json").read_text(encoding="utf-8")),
        "recipe": setup.recipe.to_yaml(),
        "table": list(table),
        "methods": described,
        "photos": photos,
        "gallery": gallery,
        "failed": [
            {"name": name, "reason": reason}
            for source in (setup.evaluation, *(getattr(v, "source", None) for v in setup.loaders.values()))
            for name, reason in (source.failed if source is not None else ())
        ],
        **merged,
    }
    path = run_dir / "report.json"
    write_json(path, content)
    return path
