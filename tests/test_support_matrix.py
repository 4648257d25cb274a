"""The support matrix: the script on a few models, and the committed table."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ["vit_little_patch16_reg4_gap_256", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
REFUSED = ["eva02_tiny_patch14_224", "cait_xxs24_224"]
"""By methods that change tokens or open the attention; those that only wrap layers take them."""
CONVOLUTIONAL = "resnet18"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "scripts" / "support_matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module
    spec.loader.exec_module(module)
    return module


def test_six_models(script):
    rows = {r["model"]: r["results"] for r in script.matrix([*SUPPORTED, *REFUSED, CONVOLUTIONAL])}
    assert rows.keys() == {*SUPPORTED, *REFUSED, CONVOLUTIONAL}
    for name in SUPPORTED:
        assert {r["verdict"] for r in rows[name].values()} == {"same"}, rows[name]
    for name in REFUSED:
        told = {m: r for m, r in rows[name].items() if m in ("diffrate", "tome", "ptq_vit", "ptq_minmax")}
        assert all(r["verdict"] == "refused" and r["reason"] for r in told.values()), told
        assert {r["verdict"] for m, r in rows[name].items() if m not in told} <= {"same"}, rows[name]
    verdicts = {m: r["verdict"] for m, r in rows[CONVOLUTIONAL].items()}
    assert verdicts["ptq_minmax"] == "same" and verdicts["diffrate"] == verdicts["ptq_vit"] == "refused"
    page = script.as_markdown([{"model": n, "family": "x", "results": r} for n, r in rows.items()])
    assert "refused [1]" in page and "**different**" not in page


def test_a_forgotten_layer_scale_would_be_seen(script):
    model, x = script.build("deit3_small_patch16_224", {"img_size": 64, "depth": 2})
    broken = copy.deepcopy(model)
    broken.blocks[1].ls2 = nn.Identity()
    with torch.inference_mode():
        difference = (broken(x) - model(x)).abs().max() / model(x).abs().max()
    assert difference > 1e-2


def test_the_committed_matrix_covers_the_field_and_shows_no_fault(script):
    rows = json.loads((ROOT / "docs" / "support_matrix.json").read_text())
    assert len(rows) >= 60 and len({r["model"] for r in rows}) == len(rows)
    assert {r["model"] for r in rows} == {n for _, names in script.MODELS.values() for n in names}
    assert {v["verdict"] for r in rows for v in r["results"].values()} == {"same", "refused"}
    assert all(set(r["results"]) == set(script.rooms()) for r in rows), "run scripts/support_matrix.py"
    assert all(v["reason"] for r in rows for v in r["results"].values() if v["verdict"] == "refused")
