"""The command line: parse, call ``gossamer.api``, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.core.errors import GossamerError, RecipeError, RunError

__all__ = ["app", "main", "method_option", "pairs", "shape"]

INTERRUPTED = 130


class Commands(typer.core.TyperGroup):
    """The command group with one way to fail: a single ``error: ...`` line and an exit code.

    Exit codes: 0 ok, 2 bad input, 1 a failure while working, 130 interrupted.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line and exit (or return, unless ``standalone_mode``)."""
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, warnings.showwarning)
            given = {**kwargs, "standalone_mode": False}
            code = self._guarded(lambda: super(Commands, self).main(*args, **given))
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; Ctrl-C is told from other endings here, where no library has wrapped it yet."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted; the same command with --resume and the same --out continues a run")
            return INTERRUPTED

    def _guarded(self, body: Callable[[], Any]) -> int:
        try:
            code = body()
            return code if isinstance(code, int) else 0
        except GossamerError as err:
            return _fail(str(err), err.exit_code)
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends
            return 1
        except Exception as err:  # noqa: BLE001 - the last line of defence: a user never sees a traceback unasked
            if os.environ.get("GOSSAMER_DEBUG"):
                raise
            if hasattr(err, "format_message"):  # a usage error of the option parser
                return _fail(f"{err.format_message()} See 'gossamer --help'.")
            text = " ".join(str(err).split())[:400]
            return _fail(f"{type(err).__name__}: {text} (GOSSAMER_DEBUG=1 shows where)", 1)


def _warn(other: Callable[..., None], message: Warning | str, category: type[Warning], file: str, *more: Any) -> None:
    """Show a warning of ours as one line; ``other`` shows those of libraries."""
    if category is UserWarning and Path(file).is_relative_to(Path(__file__).parent):
        print("warning: " + " ".join(str(message).split()), file=sys.stderr)
    else:
        other(message, category, file, *more)


def _fail(text: str, code: int = 2) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return code


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Makes vision models smaller, faster and cheaper to train, and proves it by measuring.",
)


# -- values ---------------------------------------------------------------------------------------
def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _split(text: str) -> list[str]:
    """Split at commas that are inside no bracket."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def pairs(text: str, where: str) -> dict[str, Any]:
    """Return ``k=v,k=v`` as a dictionary of YAML values.

    Raises:
        RecipeError: A part has no ``=``.
    """
    found = {}
    for part in _split(text):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            raise RecipeError(f"{where} {text!r}: {part!r} is not KEY=VALUE; write e.g. macs=60%")
        found[key.strip()] = _value(value.strip())
    return found


def method_option(text: str, where: str = "--method") -> dict[str, dict[str, Any]]:
    """Return ``NAME[:k=v,...]`` as ``{name: options}``."""
    name, _, options = text.partition(":")
    return {name.strip(): pairs(options, where)}


def shape(text: str, where: str = "--input") -> tuple[int, ...]:
    """Return ``3,224,224`` as whole numbers above 0.

    Raises:
        RecipeError: It is something else.
    """
    try:
        numbers = tuple(int(p) for p in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise RecipeError(f"{where} {text!r}: expected whole numbers above 0 with commas, e.g. 3,224,224")
    return numbers


# -- printing -------------------------------------------------------------------------------------
def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=False)


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _grid(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], title: str = "") -> None:
    """Print rows as a table; ``columns`` maps keys to heads, columns without data are left out."""
    from rich import box
    from rich.table import Table

    shown = [k for k in columns if any(r.get(k) not in (None, "") for r in rows)]
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for key in shown:
        numeric = all(isinstance(r.get(key), int | float | None) for r in rows)
        table.add_column(columns[key], justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*(_cell(key, row.get(key)) for key in shown))
    _console().print(table)


def _cell(key: str, value: Any) -> str:
    from rich.markup import escape

    from gossamer.report.numbers import as_fact

    if value in (None, "", [], ()):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(as_fact(key, value))


def _facts(value: Mapping[str, Any], prefix: str = "") -> None:
    """Print nested facts, one per line."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            _facts(item, f"{name}.")
        elif isinstance(item, list) and item and isinstance(item[0], Mapping):
            _grid(item, {k: k.replace("_", " ") for k in item[0]}, title=name)
        elif item not in (None, [], {}):
            _console().print(f"[dim]{name:<28}[/dim] {_cell(key, item)}")


def _timings(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return result rows with one column per latency figure."""
    from gossamer.report.scoring import as_score, interval_of, metric_of, score_of

    flat = []
    for row in table:
        new = dict(row)
        for batch, timed in (row.get("latency") or {}).items():
            names = ("median_ms", "ratio_torch", "ratio_fp32", "ratio_best_dense")
            new |= {f"{batch}_{k}": timed.get(k) for k in names}
        score, metric = score_of(row), metric_of([row])
        new["score"] = "" if score is None else as_score(score, metric)
        new["interval"] = "-".join(as_score(v, metric, unit=False) for v in interval_of(row) or ())
        flat.append(new)
    return flat


def _result(result: Any, as_json: bool) -> None:
    """Print a finished run: the table, then where things are; of several processes only the first has one."""
    if not result.table:
        return
    if as_json:
        _json({"run_dir": str(result.run_dir), "report": str(result.report), "table": result.table})
        return
    from gossamer.report.scoring import metric_of

    batches = sorted({b for r in result.table for b in (r.get("latency") or {})}, key=float)
    columns = {"stage": "Stage", "runtime": "Runtime", "precision": "Precision", "macs": "MACs", "params": "Params",
               "file_bytes": "File", "score": metric_of(result.table)["name"], "interval": "95 %",
               "agreement": "Agreement"}  # fmt: skip
    for b in batches:
        columns |= {f"{b}_median_ms": f"b{b} latency", f"{b}_ratio_torch": "/ torch", f"{b}_ratio_fp32": "/ fp32",
                    f"{b}_ratio_best_dense": "/ best"}  # fmt: skip
    _grid(_timings(result.table), columns)
    for row in result.table:
        if row.get("note"):
            _console().print(f"[dim]{row['stage']}, {row.get('runtime', '')}:[/dim] {_cell('note', row['note'])}")
    _console().print(f"\nrun     {result.run_dir}\nreport  {result.report}", soft_wrap=True)


# -- options used by several commands -------------------------------------------------------------
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder.", show_default="runs/NAME-TIME")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")]
Data = Annotated[str | None, typer.Option("--data", help="folder:PATH, zip:, npz:, parquet:, hf:, embedded.")]
Model = Annotated[str, typer.Argument(help="timm name, NAME@WEIGHTS.safetensors, saved or exported folder, graph.")]
Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values to change.")]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="NAME[:k=v,...], where not as the model says.", show_default="its own")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads.")]


@app.callback(invoke_without_command=True)
def _start(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib import metadata

        print(metadata.version("gossamer"))
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


# -- runs -----------------------------------------------------------------------------------------
@app.command(epilog="Example: gossamer quickstart --out runs/quickstart")
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/quickstart"),
    resume: Resume = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minute's rehearsal; its figures mean nothing.")] = False,
    json_: Json = False,
) -> None:
    """Do the main job on the embedded model and photographs: no network, no other file."""
    from gossamer import api

    _result(api.quickstart(out=out, resume=resume, quick=quick, progress=True), json_)


@app.command(epilog="Example: gossamer methods diffrate")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the card of one method.")] = None, json_: Json = False
) -> None:
    """List the methods, or show one method's card."""
    from gossamer import api
    from gossamer.core import registry

    rows = api.methods()
    if name is None:
        if json_:
            _json(rows)
        else:
            _grid(rows, {k: k for k in ("name", "title", "arxiv", "family", "tasks", "stage", "status")})
        return
    chosen = registry.info(name).name
    if json_:
        _json({**next(r for r in rows if r["name"] == chosen), "card": api.card(chosen)})
    elif sys.stdout.isatty():
        from rich.markdown import Markdown

        _console().print(Markdown(api.card(chosen)))
    else:
        print(api.card(chosen))


@app.command(epilog="Example: gossamer plan recipe.yaml train.steps=200")
def plan(recipe: Recipe, overrides: Overrides = None, json_: Json = False) -> None:
    """Show a recipe's phases, turns, groups, edits, cost, estimated time and disk, without training."""
    from gossamer import api

    found = api.plan(recipe, overrides or [])
    if json_:
        _json(found)
        return
    _facts({k: v for k, v in found.items() if k not in ("phases", "edits")})
    rows = []
    for phase in found.get("phases", []):
        turns = phase.get("turns") or []
        trains = ["; ".join(g["group"] for g in t.get("trains", [])) for t in turns]
        rows.append({**phase, "turns": ", ".join(t["name"] for t in turns), "trains": ", ".join(trains)})
    _grid(rows, {k: k for k in ("phase", "steps", "kind", "turns", "trains", "schedule")}, title="phases")
    edits = [{"method": e["method"], "edit": json.dumps(e["edit"])[:100]} for e in found.get("edits", [])]
    if edits:
        _grid(edits, {"method": "method", "edit": "edit"}, title="edits")


@app.command(epilog="Example: gossamer run recipe.yaml train.lr=1e-4 --out runs/a")
def run(
    recipe: Recipe, overrides: Overrides = None, out: Out = None, resume: Resume = False, json_: Json = False
) -> None:
    """Run a recipe: train, finish, save, export, measure, report."""
    from gossamer import api

    if resume and out is None:
        raise RecipeError("run --resume: which run? Name its folder with --out DIR")
    _result(api.run(recipe, overrides or [], out, resume=resume, progress=True), json_)


@app.command(
    epilog="Example: gossamer compress --model vit_tiny_patch16_224@w.safetensors --data folder:photos "
    "--method diffrate:macs=60% --method ptq_vit --target max_drop=1.0"
)
def compress(  # noqa: PLR0913 - one parameter per option
    model: Annotated[str, typer.Option("--model", help="timm name, NAME@WEIGHTS.safetensors or saved folder.")],
    data: Annotated[str, typer.Option("--data", help="folder:PATH, zip:, npz:, parquet:, hf:, embedded.")],
    method: Annotated[list[str], typer.Option("--method", help="NAME[:key=value,...]; repeat for several.")],
    target: Annotated[list[str] | None, typer.Option("--target", help="macs=60%, latency=12ms, max_drop=0.5.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="'self', or a MODEL.")] = None,
    train: Annotated[list[str] | None, typer.Option("--train", help="Training: steps=100,lr=1e-5.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Evaluation images.", show_default="1/5 of D")
    ] = None,
    task: TaskOption = None,
    out: Out = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Compress a model by one or more methods; the run folder holds the recipe, too."""
    from gossamer import api

    bounds = {k: v for t in target or [] for k, v in pairs(t, "--target").items()}
    settings = {k: v for t in train or [] for k, v in pairs(t, "--train").items()}
    result = api.compress(
        model, data, [method_option(m) for m in method], target=bounds or None, teacher=teacher,
        evaluation=evaluation, train=settings or None, task=method_option(task, "--task") if task else None,
        out=out, resume=resume, progress=True,
    )  # fmt: skip
    _result(result, json_)


# -- models ---------------------------------------------------------------------------------------
@app.command(epilog="Example: gossamer cost deit_small_patch16_224 --json")
def cost(
    model: Model,
    input_: Annotated[
        str | None, typer.Option("--input", help="C,H,W of one image.", show_default="the model's")
    ] = None,
    json_: Json = False,
) -> None:
    """Count MACs, BOPs, parameters and bytes, in total and per layer."""
    from gossamer import api

    found = api.cost(model, shape(input_) if input_ else None).to_json()
    if json_:
        _json(found)
        return
    _facts({k: v for k, v in found.items() if not isinstance(v, list)})
    for key, rows in found.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            _grid(rows, {k: k.replace("_", " ") for k in rows[0]}, title=key.replace("_", " "))


@app.command(epilog="Example: gossamer bench deit_small_patch16_224 runs/a/model --runtime openvino --batch 1,8")
def bench(  # noqa: PLR0913 - one parameter per option
    models: Annotated[list[str], typer.Argument(help="MODELs; ratios are against the first.")],
    runtime: Annotated[str, typer.Option("--runtime", help="openvino,onnxruntime,torch.")] = "openvino",
    batch: Batches = "1,8",
    threads: Threads = 2,
    precision: Annotated[str | None, typer.Option("--precision", help="f32 or bf16.", show_default="all")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 7,
    json_: Json = False,
) -> None:
    """Time models side by side in one interleaved run."""
    from gossamer import api

    rows = api.bench(
        models, batch=shape(batch, "--batch"), threads=threads, runtime=_split(runtime), precision=precision,
        rounds=rounds,
    )  # fmt: skip
    if json_:
        _json(rows)
        return
    columns = {"model": "Model", "runtime": "Runtime", "precision": "Precision", "batch": "Batch",
               "median_ms": "Median", "iqr_ms": "IQR", "ratio": "first / this", "ratio_best_dense": "best first / this",
               "reason": "Not trusted"}  # fmt: skip
    _grid(rows, columns)


@app.command(epilog="Example: gossamer evaluate runs/a/model --data folder:photos --runtime openvino")
def evaluate(  # noqa: PLR0913 - one parameter per option
    model: Model,
    data: Annotated[str, typer.Option("--data", help="folder:PATH, zip:, npz:, parquet:, hf:, embedded.")],
    runtime: Annotated[str, typer.Option("--runtime", help="torch, openvino or onnxruntime.")] = "torch",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N images only.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 8,
    precision: Annotated[str | None, typer.Option("--precision", help="f32 or bf16.")] = None,
    task: TaskOption = None,
    threads: Threads = 2,
    json_: Json = False,
) -> None:
    """Measure a model by its task's figures, in torch or in a runtime."""
    from gossamer import api

    found = api.evaluate(
        model, data, runtime, limit=limit, batch=batch, precision=precision, threads=threads,
        task=None if task is None else method_option(task, "--task"),
    )  # fmt: skip
    _json(found) if json_ else _facts(found)


@app.command(epilog="Example: gossamer export runs/a/model --format onnx,openvino --int8 --data embedded --max-drop 1")
def export(  # noqa: PLR0913 - one parameter per option
    model: Model,
    formats: Annotated[str, typer.Option("--format", help="onnx,openvino.")] = "openvino",
    out: Annotated[Path, typer.Option("--out", help="Folder for the artefacts.")] = Path("exported"),
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to 8 bits first; needs --data.")] = False,
    data: Data = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0.0, help="Largest loss of accuracy, points.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option("--min-speedup", min=0.0, help="Least ratio to the best dense precision.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch size, or 'dynamic'.")] = "1",
    json_: Json = False,
) -> None:
    """Export with proof: parity with torch, accuracy, speed; exit 1 when a stated bound is not met."""
    from gossamer import api

    size: int | str = batch if batch == "dynamic" else shape(batch, "--batch")[0]
    found = api.export(
        model, out, _split(formats), int8=int8, data=data, max_drop=max_drop, min_speedup=min_speedup, batch=size
    )
    _json(found) if json_ else _facts(found)


@app.command(epilog="Example: gossamer upscale photo.jpg large.png --model runs/sr/model")
def upscale(  # noqa: PLR0913 - one parameter per option
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The picture to write, or a folder.")],
    model: Annotated[str, typer.Option("--model", help="A MODEL for super-resolution.")],
    scale: Annotated[int | None, typer.Option("--scale", min=1, help="Scale expected of the model.")] = None,
    runtime: Annotated[str, typer.Option("--runtime", help="torch, openvino or onnxruntime.")] = "torch",
    tile: Annotated[int | None, typer.Option("--tile", min=1, help="Side of the tiles in torch.")] = None,
    overlap: Annotated[
        int | None, typer.Option("--overlap", min=0, help="Pixels that tiles share on each side.", show_default="16")
    ] = None,
    threads: Threads = 2,
    json_: Json = False,
) -> None:
    """Enlarge pictures by a super-resolution model, in tiles where they are large."""
    from gossamer import api

    rows = api.upscale(
        source, target, model, scale=scale, runtime=runtime, tile=tile, overlap=overlap, threads=threads,
        progress=not json_,
    )  # fmt: skip
    if json_:
        _json(rows)
    if left := [row["image"] for row in rows if row["out"] is None]:
        names = ", ".join(left[:5]) + ", ..." * (len(left) > 5)
        raise RunError(f"upscale: {len(left)} of {len(rows)} pictures were left out, for the reasons above: {names}")


# -- the rest -------------------------------------------------------------------------------------
@app.command(epilog="Example: gossamer report runs/a runs/b --out comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file.", show_default="report.html in RUN")] = None,
    json_: Json = False,
) -> None:
    """Write the HTML report of a run, or a comparison of several."""
    from gossamer import api

    path = api.report(runs, out)
    _json({"report": str(path)}) if json_ else print(path)


@app.command(epilog="Example: gossamer doctor --json")
def doctor(json_: Json = False) -> None:
    """Show versions, CPU features, kernels and runtimes; what is missing and how to get it."""
    from gossamer import api

    found = api.doctor()
    if json_:
        _json(found)
        return
    _facts({k: v for k, v in found.items() if k != "missing"})
    if found.get("missing"):
        _grid(found["missing"], {"what": "what", "package": "package", "remedy": "remedy"}, title="missing")


def main() -> None:
    """Entry point of the ``gossamer`` command."""
    app()


if __name__ == "__main__":
    main()
