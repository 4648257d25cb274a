"""The set that ships: complete, credited, and its evaluation part apart from the rest."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest

from gossamer.data.embedded_set import credits
from gossamer.data.loading import batches
from gossamer.data.sources import open_data, take
from gossamer.data.transforms import eval_transform
from gossamer.models.build import EMBEDDED_MODEL, load_model, preprocessing
from gossamer.tasks.classification import Classification, predictor


def test_splits_are_disjoint_complete_and_a_function_of_the_names():
    parts = {s: list(open_data(f"embedded:{s}").names) for s in ("search", "calibration", "eval")}
    assert {s: len(n) for s, n in parts.items()} == {"search": 168, "calibration": 32, "eval": 467}
    everything = list(open_data("embedded").names)
    assert sorted(sum(parts.values(), [])) == sorted(everything) and len(set(everything)) == 667
    order = sorted(everything, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest())
    assert set(order[:32]) == set(parts["calibration"]) and set(order[32:200]) == set(parts["search"])


def test_no_photograph_is_in_two_splits_under_two_names():
    digest = {}
    source = open_data("embedded")
    for sample in source:
        digest.setdefault(hashlib.sha256(sample.image.tobytes()).digest(), []).append(sample.name)
    assert not source.failed and all(len(names) == 1 for names in digest.values())


def test_every_photograph_is_credited():
    rows = credits()
    assert {r["file"] for r in rows} == set(open_data("embedded").names)
    assert all(r["author"] and "creativecommons.org/licenses/by/" in r["license"] for r in rows)
    assert all(r["landing_url"].startswith("http") for r in rows)


def test_it_fits_the_wheel():
    folder = Path(str(resources.files("gossamer.data.embedded")))
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) < 29e6


def test_embedded_model_recognises_photographs():
    model = load_model(EMBEDDED_MODEL)
    images = take(open_data("embedded:eval"), range(0, 60))
    result = Classification().evaluate(predictor(model), batches(images, eval_transform(preprocessing(model)), 20))
    assert result.top1 > 0.75 and result.interval[0] < result.top1 < result.interval[1]


@pytest.mark.slow
def test_embedded_model_reaches_its_figure():
    model = load_model(EMBEDDED_MODEL)
    batch = batches(open_data("embedded"), eval_transform(preprocessing(model)), 32, workers=2)
    assert 100 * Classification().evaluate(predictor(model), batch).top1 == pytest.approx(87.86, abs=0.005)
