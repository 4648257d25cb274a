"""Six methods in one recipe: cheap training from scratch, pruning, fewer tokens, distillation, 8 bits, export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gossamer.conformance.running import differing, interrupted_run, run
from gossamer.core import registry
from gossamer.core.method import Method
from gossamer.core.schedule import Phase
from gossamer.data.images import ImageSource
from gossamer.kits.example import MethodExample, tiny_vit
from gossamer.models.store import load
from gossamer.pipeline.execute import execute
from gossamer.recipe import Recipe

OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
GROUPS = {"emb": 8, "head": 1, "qk": 4, "v": 4, "mlp": 16}
METHODS = [
    {"mesa": {}},
    {"autoprog": {"phase": "pretrain", "stages": 2, "resolution_step": 8, "search_ratio": 0.5, "records": 1,
                  "batches": 2, "cost": "macs"}},
    {"nvit": {"macs": "70%", "interval": 2, "rounds": 2, "group_sizes": GROUPS, "distil_fit": False}},
    {"diffrate": {"macs": "80%", "search_steps": 2}},
    {"manifold_distillation": {"k": 16}},
    {"ptq_vit": {"images": 4, "max_iter": 0}},
]  # fmt: skip
PHASES = ["pretrain.super0.0", "pretrain.score0.0", "pretrain.stage0", "pretrain.stage1",
          "nvit.prune", "diffrate.search", "fit", "ptq_vit.calibrate"]  # fmt: skip


def _source(count: int) -> ImageSource:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    names, labels = [str(i) for i in range(count)], [i % 10 for i in range(count)]
    return ImageSource(names, labels, lambda i: Image.fromarray(pixels[i]), [str(c) for c in range(10)])


def test_one_recipe_trains_prunes_reduces_distils_quantizes_and_exports(tmp_path: Path) -> None:
    recipe = Recipe(
        model={"name": "vit_tiny_patch16_224", "num_classes": 10, "options": OPTIONS},
        methods=METHODS,
        train={"pretrain": {"steps": 8, "lr": 1e-3}, "steps": 2, "batch_size": 4, "lr": 1e-4},
        export={"runtimes": ["openvino"], "batch": [1], "rounds": 2},
    )
    sources = {"train": _source(24), "eval": _source(8)}
    result = execute(recipe, tmp_path / "run", sources=sources, progress=False)
    ends = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in ends if r.get("event") == "end"] == PHASES
    rows = {r["name"]: r for r in result.table}
    assert list(rows) == ["dense", "nvit.prune", "diffrate.search", "fit", "finished"]
    macs = [rows[n]["macs"] for n in rows]
    assert macs[1] <= 0.7 * macs[0] and macs[2] < macs[1] and macs[2] == macs[3]
    assert rows["nvit.prune"]["params"] < rows["dense"]["params"]
    assert rows["finished"]["bops"] < 0.1 * rows["fit"]["bops"] and rows["finished"]["precision"].startswith("int8")
    page = (result.report or Path()).read_text(encoding="utf-8")
    for name in ("AutoProg", "Mesa", "NViT", "DiffRate", "ManifoldDistillation", "PTQViT", *PHASES):
        assert name in page
    again = load(tmp_path / "run" / "model")  # no training code, no trace of growth or packed activations
    assert not differing(again, result.model)


def test_the_whole_stack_resumes_exactly_from_every_step() -> None:
    case = MethodExample(
        method=lambda: registry.build("mesa", {}),
        model=lambda: tiny_vit(depth=4),
        plan=(Phase("pretrain", 8), Phase("fit", 2)),
    )

    def methods() -> Sequence[Method]:
        return [registry.build(name, dict(options)) for entry in METHODS for name, options in entry.items()]

    whole, cut = run(case, methods()), interrupted_run(case, methods)
    assert not differing(whole.model, cut.model)
    assert whole.rows == cut.rows and whole.stack.edits == cut.stack.edits
