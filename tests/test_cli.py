"""The command line: frozen commands and options, what reaches the API, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from gossamer import api, cli
from gossamer.core import registry
from gossamer.core.errors import RecipeError, RunError

OPTIONS = {
    "quickstart": {"--out", "--resume", "--quick", "--json"},
    "methods": {"name", "--json"},
    "plan": {"recipe", "overrides", "--json"},
    "run": {"recipe", "overrides", "--out", "--resume", "--json"},
    "compress": {"--model", "--data", "--method", "--target", "--teacher", "--train", "--eval", "--task", "--out",
                 "--resume", "--json"},
    "cost": {"model", "--input", "--json"},
    "bench": {"models", "--runtime", "--batch", "--threads", "--precision", "--rounds", "--json"},
    "evaluate": {"model", "--data", "--runtime", "--limit", "--batch", "--precision", "--task", "--threads",
                 "--json"},
    "export": {"model", "--format", "--out", "--int8", "--data", "--max-drop", "--min-speedup", "--batch", "--json"},
    "report": {"runs", "--out", "--json"},
    "upscale": {"source", "target", "--model", "--scale", "--runtime", "--tile", "--overlap", "--threads", "--json"},
    "doctor": {"--json"},
}  # fmt: skip
ROW = {
    "stage": "dense", "runtime": "openvino", "precision": "f32", "macs": 1.258e9, "params": 5_717_416,
    "note": "why [so]",
    "file_bytes": 22_900_000, "top1": 0.877, "top1_interval": [0.84, 0.91], "agreement": 1.0,
    "latency": {"1": {"median_ms": 9.2, "ratio_torch": 1.37, "ratio_fp32": 1.0, "ratio_best_dense": 0.42}},
}  # fmt: skip


@pytest.fixture
def call(monkeypatch):
    """Return ``call(*words) -> result`` of the command line in this process."""
    monkeypatch.delenv("GOSSAMER_DEBUG", raising=False)

    def run(*words: object):
        return CliRunner().invoke(cli.app, [str(w) for w in words])

    return run


@pytest.fixture
def seen(monkeypatch):
    """Replace the API by recorders; returns what they were called with."""
    calls: dict[str, tuple] = {}
    run_result = SimpleNamespace(run_dir=Path("runs/x"), report=Path("runs/x/report.html"), table=[ROW])
    answers = {
        "quickstart": run_result, "run": run_result, "compress": run_result,
        "plan": {"name": "x", "order": ["A"], "phases": [{"phase": "fit", "steps": 3, "turns": [
            {"name": "main", "trains": [{"group": "weights"}]}]}], "edits": [{"method": "A", "edit": {"keep": [1]}}]},
        "bench": [{"model": "a", "runtime": "torch", "precision": "f32", "batch": 1, "median_ms": 1.0, "ratio": 1.0}],
        "evaluate": {"top1": 0.5, "skipped": []},
        "export": {"artefacts": [{"format": "onnx", "graph": "m.onnx"}], "unmet": []},
        "report": Path("runs/x/report.html"),
        "cost": SimpleNamespace(to_json=lambda: {"macs": 10, "bops": 10240, "params": 5, "weight_bytes": 20,
                                                 "per_layer": [{"name": "head", "macs": 10}]}),
    }  # fmt: skip

    def recorder(name):
        def record(*args, **kwargs):
            calls[name] = (args, kwargs)
            return answers[name]

        return record

    for name in answers:
        monkeypatch.setattr(api, name, recorder(name))
    return calls


def _commands() -> dict[str, object]:
    return dict(typer.main.get_command(cli.app).commands)


def test_commands_and_options_are_frozen():
    found = {
        name: {next((o for o in p.opts if o.startswith("--")), p.name) for p in command.params}
        for name, command in _commands().items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_help_has_an_example(call, name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"Example: gossamer {name}" in " ".join(result.stdout.split())


def test_no_command_prints_help(call):
    result = call()
    assert result.exit_code == 0 and "quickstart" in result.stdout


def test_version(call):
    assert call("--version").stdout.strip().count(".") == 2


@pytest.mark.parametrize("words", [
    ("quickstart",), ("run", "r.yaml"), ("plan", "r.yaml"), ("cost", "m"), ("bench", "m"), ("report", "d"),
    ("evaluate", "m", "--data", "embedded"), ("export", "m"),
    ("compress", "--model", "m", "--data", "d", "--method", "a"),
], ids=lambda words: words[0])  # fmt: skip
def test_every_command_prints_tables_and_json(call, seen, words):
    plain = call(*words)
    assert plain.exit_code == 0 and plain.stdout.strip(), plain.stderr
    as_json = call(*words, "--json")
    assert as_json.exit_code == 0
    json.loads(as_json.stdout)


def test_the_table_of_a_run_shows_figures_and_notes(call, seen):
    text = call("run", "r.yaml").stdout
    for part in ("1.26 G", "22.9 MB", "9.20", "1.37", "0.42", "why [so]", "runs/x/report.html"):
        assert part in text


def test_compress_parses_methods_targets_and_training(call, seen):
    call("compress", "--model", "m", "--data", "embedded", "--method", "diffrate:macs=60%,blocks=[3,6],tile=16",
         "--method", "ptq_vit", "--target", "macs=60%,max_drop=0.5", "--train", "steps=10,lr=1.0e-5",
         "--teacher", "self", "--out", "o")  # fmt: skip
    args, kwargs = seen["compress"]
    assert args == ("m", "embedded", [{"diffrate": {"macs": "60%", "blocks": [3, 6], "tile": 16}}, {"ptq_vit": {}}])
    assert kwargs["target"] == {"macs": "60%", "max_drop": 0.5} and kwargs["train"] == {"steps": 10, "lr": 1e-5}
    assert kwargs["teacher"] == "self" and kwargs["out"] == Path("o")


def test_run_passes_overrides(call, seen):
    call("run", "r.yaml", "train.lr=1e-4", "seed=3", "--out", "o", "--resume")
    args, kwargs = seen["run"]
    assert args == (Path("r.yaml"), ["train.lr=1e-4", "seed=3"], Path("o")) and kwargs["resume"]


def test_bench_and_cost_parse_numbers(call, seen):
    call("bench", "a", "b", "--runtime", "openvino,torch", "--batch", "1,8", "--threads", "1")
    args, kwargs = seen["bench"]
    assert args == (["a", "b"],)
    assert kwargs["batch"] == (1, 8) and kwargs["runtime"] == ["openvino", "torch"] and kwargs["threads"] == 1
    call("cost", "a", "--input", "3,64,64")
    assert seen["cost"][0] == ("a", (3, 64, 64))


def test_export_batch_is_a_number_or_dynamic(call, seen):
    call("export", "a", "--format", "onnx,openvino", "--batch", "dynamic", "--max-drop", "0.5")
    args, kwargs = seen["export"]
    assert args[2] == ["onnx", "openvino"] and kwargs["batch"] == "dynamic" and kwargs["max_drop"] == 0.5
    call("export", "a", "--batch", "4")
    assert seen["export"][1]["batch"] == 4


@pytest.mark.parametrize("words, part", [
    (("mthods",), "methods"),
    (("cost",), "Missing argument"),
    (("cost", "m", "--inptu", "3"), "--input"),
    (("cost", "m", "--input", "3,a"), "3,224,224"),
    (("bench", "m", "--batch", "0"), "above 0"),
    (("bench", "m", "--threads", "0"), "threads"),
    (("compress", "--model", "m", "--data", "d", "--method", "a:60%"), "KEY=VALUE"),
    (("compress", "--model", "m", "--data", "d", "--method", "a", "--target", "60%"), "KEY=VALUE"),
    (("run", "r.yaml", "--resume"), "--out DIR"),
], ids=lambda w: " ".join(w) if isinstance(w, tuple) else "")  # fmt: skip
def test_wrong_words_get_one_line_and_exit_2(call, words, part):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert part in result.stderr


@pytest.mark.parametrize("error, code", [
    (RecipeError("bad\nvalue"), 2), (RunError("bound missed"), 1), (OSError("disk"), 1), (KeyboardInterrupt(), 130),
], ids=lambda e: type(e).__name__ if isinstance(e, BaseException) else str(e))  # fmt: skip
def test_exit_codes(call, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(api, "run", fail)
    result = call("run", "r.yaml")
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    if code == 130:
        assert "--resume" in result.stderr


def test_our_warnings_are_one_line_and_those_of_libraries_keep_their_form(call, monkeypatch):
    def warn(*args, **kwargs):
        warnings.warn_explicit("the table is\nforeign", UserWarning, api.__file__, 1)
        warnings.warn_explicit("old", UserWarning, "/site/library.py", 7)
        raise RunError("enough")

    monkeypatch.setattr(api, "run", warn)
    with pytest.warns(UserWarning, match="old"):
        result = call("run", "r.yaml")
    assert result.stderr.splitlines() == ["warning: the table is foreign", "error: enough"]


def test_debug_shows_the_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(api, "run", fail)
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["run", "r.yaml"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_methods_lists_every_room_with_the_promised_keys(call):
    rows = json.loads(call("methods", "--json").stdout)
    assert {r["name"] for r in rows} == set(registry.methods())
    for row in rows:
        assert {"name", "title", "arxiv", "family", "tasks", "stage", "touches", "status"} <= row.keys()


def test_methods_shows_a_card_by_either_name(call):
    entry = next(iter(registry.methods().values()))
    assert call("methods", entry.name).stdout == call("methods", entry.cls).stdout
    assert call("methods", entry.name).stdout.strip() == registry.card(entry.name).strip()


def test_report_command_writes_a_page(call, tmp_path):
    (tmp_path / "report.json").write_text('{"title": "a", "summary": {"x": 1}}')
    result = call("report", tmp_path, "--json")
    assert Path(json.loads(result.stdout)["report"]).read_text().startswith("<!doctype html>")


def test_doctor_names_versions(call):
    found = json.loads(call("doctor", "--json").stdout)
    assert found["versions"]["torch"] and "missing" in found
    assert call("doctor").exit_code == 0


def test_listing_methods_imports_no_torch():
    code = "import sys; from gossamer import cli; from typer.testing import CliRunner;" \
           "r = CliRunner().invoke(cli.app, ['methods']); assert r.exit_code == 0, r.stderr;" \
           "print([m for m in ('torch', 'timm', 'openvino') if m in sys.modules])"  # fmt: skip
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - start < 10
