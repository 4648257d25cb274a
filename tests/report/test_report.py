"""The report as text: what is on the page, what is left out, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gossamer.core.errors import StateError
from gossamer.report import build_report
from gossamer.report.numbers import as_bytes, as_count, as_fact, as_percent, as_share, nice_ticks
from gossamer.report.profile import KINDS, kind, profiles
from gossamer.report.saved import sentence
from gossamer.report.scatter import Point, accuracy_latency, frontier


def test_page_holds_every_section_and_nothing_remote(fake_run, tmp_path):
    html = build_report([fake_run()], tmp_path / "report.html").read_text()
    for part in ("r0-speed", "r0-table", "r0-tokens", "r0-photos", "r0-layers", "r0-curves", "r0-profile", "r0-recipe"):
        assert f'id="{part}"' in html
    assert "Truly saved." in html and "physically gone" in html
    assert "Not faster than bf16" in html
    assert "torch 1.30×" in html and "predict 1.67×" in html
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert "url(" not in html and "@import" not in html


def test_sections_without_data_are_left_out(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"title": "bare", "environment": {"torch": "2.11"}}))
    html = build_report([folder], tmp_path / "report.html").read_text()
    assert 'id="r0-environment"' in html
    for part in ("r0-speed", "r0-table", "r0-tokens", "r0-photos", "r0-layers", "r0-curves", "r0-profile", "r0-recipe"):
        assert f'id="{part}"' not in html


def test_run_folder_files_fill_the_gaps_and_a_torn_line_is_ignored(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: killed\n")
    rows = [{"phase": "fit", "turn": "main", "step": i, "terms": {"task": 1.0 / (i + 1)}} for i in range(4)]
    rows.append({"phase": "fit", "event": "end", "steps": 4, "seconds": 4500.0, "cpu_seconds": 8.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"phase": "fi')
    html = build_report([folder], tmp_path / "report.html").read_text()
    assert "name: killed" in html and "4 steps" in html
    assert "1 h 15 min" in html and "8.2 s" in html


def test_several_runs_are_compared_in_one_table(fake_run, tmp_path):
    runs = [fake_run("first"), fake_run("second", title="ToMe")]
    html = build_report(runs, tmp_path / "report.html").read_text()
    assert "2 runs compared" in html
    assert html.count('id="all-row-') == 20
    assert 'id="r0-table"' not in html


def test_markup_in_the_data_is_escaped(fake_run, tmp_path):
    run = fake_run(title="<script>alert(1)</script>", failed=[{"name": "</script><b>", "reason": "x"}])
    html = build_report([run], tmp_path / "report.html").read_text()
    assert "<script>alert" not in html and "</script><b>" not in html


def test_photo_paths_stay_inside_the_run_folder(fake_run, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(StateError, match="not in the run folder"):
        build_report([fake_run(photos=[{"name": "p", "image": "../secret.png"}])], tmp_path / "report.html")


def test_refusals_name_the_folder(tmp_path, fake_run):
    with pytest.raises(StateError, match="no such run folder"):
        build_report([tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError, match="neither report.json"):
        build_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(StateError, match="no run folder"):
        build_report([], tmp_path / "report.html")
    with pytest.raises(StateError, match="form no grid"):
        build_report([fake_run(photos=[{"name": "p", "image": "data:image/png;base64,", "blocks": [[1, 2, 3]]}])],
                     tmp_path / "report.html")  # fmt: skip


def _row(stage: str, ratio: float, best: float | None, macs: float = 1e9) -> dict[str, object]:
    timing = {"median_ms": 5.0 / ratio, "ratio_fp32": ratio, "ratio_best_dense": best}
    return {"stage": stage, "runtime": "openvino", "macs": macs, "latency": {"1": timing}}


def test_the_sentence_says_what_is_slower():
    fast = sentence([_row("dense", 1.0, 0.5), _row("small", 2.5, 1.25, 6e8)])
    assert "40" in fast and "2.50× (batch 1) as fast as the dense fp32" in fast and "1.25×" in fast
    slow = sentence([_row("dense", 1.0, 0.5), _row("small", 0.8, 0.4)])
    assert "0.80×" in slow and "faster choice" in slow and "gone" not in slow
    assert sentence([_row("dense", 1.0, 0.5)]) == ""


def test_frontier_keeps_what_nothing_beats():
    a, b, c = Point("a", "a", 0, "", 1.0, 70.0), Point("b", "b", 0, "", 2.0, 80.0), Point("c", "c", 0, "", 3.0, 75.0)
    assert [p.key for p in frontier([c, b, a])] == ["a", "b"]
    assert "data-row" in accuracy_latency([a], "one")


def test_numbers():
    assert as_count(1.258e9) == "1.26 G" and as_count(5_717_416) == "5.72 M" and as_count(197) == "197"
    assert as_bytes(22_900_000) == "22.9 MB" and as_bytes(2500) == "2.5 kB"
    assert as_share(87.5) == as_share(0.875) and as_percent(0.875).startswith("87.5")
    ticks = nice_ticks(0.3, 9.7)
    assert ticks[0] <= 0.3 and ticks[-1] >= 9.7
    assert len(nice_ticks(3.0, 3.0)) > 1


def test_cli_path_is_created(fake_run, tmp_path):
    out = tmp_path / "deep" / "er" / "r.html"
    assert build_report([fake_run()], out) == out and Path(out).is_file()


def test_token_counts_of_a_method_become_the_chart(fake_run, tmp_path):
    run = fake_run(tokens={"in": 197, "after_prune": [190, 150], "after_merge": [180, 140]})
    html = build_report([run], tmp_path / "r.html").read_text()
    assert "block 1: 140 of 197 tokens kept" in html and "30 pruned here" in html and "10 merged here" in html


def test_layers_come_from_a_methods_table(fake_run, tmp_path):
    rows = [{"layer": "blocks.0.attn.qkv", "bits": "8x6", "relative error": 0.01, "correlation": 0.9995}]
    run = fake_run(quantization=[], methods={"Q": {"tables": [{"title": "Quantized layers", "rows": rows}]}})
    html = build_report([run], tmp_path / "r.html").read_text()
    assert 'id="r0-layers"' in html and "weight bits: 8" in html and "activation bits: 6" in html


def test_ratios_are_known_by_their_name():
    assert as_fact("8_ratio_fp32", 1.5) == as_fact("ratio", 1.5) == "1.50×"


def test_facts_read_well_inside_lists_and_mappings():
    assert as_fact("top1_interval", [0.161, 0.5625]) == f"{as_percent(0.161)}, {as_percent(0.5625)}"
    assert as_fact("parity", {"relative": 2.88e-7, "tolerance": 0.001}) == "relative 2.88e-07, tolerance 0.001"


def test_operators_are_sorted_into_kinds_of_work():
    named = {"8-bit products": {"type": "FullyConnected", "product": True, "precision": "i8"},
             "other products": {"type": "MatMul", "product": True, "precision": "bf16"},
             "changing precision": {"type": "DequantizeLinear"}, "picking and moving": {"type": "GatherElements"},
             "everything else": {"type": "Softmax", "precision": "i8"}}  # fmt: skip
    assert {KINDS[kind(op)] for op in named.values()} == set(KINDS)
    assert all(KINDS[kind(op)] == name for name, op in named.items())


def test_profiles_share_one_scale_and_say_the_8_bit_share():
    ops = [{"type": "MatMul", "product": True, "precision": "i8", "ms": 3.0},
           {"type": "MatMul", "product": True, "precision": "f32", "ms": 1.0},
           {"type": "Softmax", "ms": 4.0}]  # fmt: skip
    fast, slow = profiles([{"runtime": "openvino", "stage": "done", "ops": ops, "int8_share": 0.75},
                           {"runtime": "onnxruntime", "stage": "dense", "ops": ops * 10}])  # fmt: skip
    assert fast["graphs"][0]["int8"] == slow["graphs"][0]["int8"] == as_percent(0.75, 0)
    assert fast["graphs"][0]["kinds"] == [3.0, 1.0, 0.0, 0.0, 4.0]
    assert [name for _, name in fast["kinds"]] == ["8-bit products", "other products", "everything else"]
    assert ">80<" in fast["bars"] and ">80<" in slow["bars"]
    assert profiles(None) == profiles([{"runtime": "torch", "ops": []}]) == []


def test_the_profile_is_read_from_the_run_folder(fake_run, tmp_path):
    run = fake_run(profile=None)
    given = [{"runtime": "openvino", "stage": "dense", "ops": [{"type": "Softmax", "kernel": "only-here", "ms": 1.0}]}]
    (run / "profile.json").write_text(json.dumps(given))
    assert "only-here" in build_report([run], tmp_path / "report.html").read_text()
