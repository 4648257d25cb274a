"""Run a recipe from beginning to end: train, finish, save, export, measure, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core.errors import RunError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase
from gossamer.cost.ledger import cost
from gossamer.data.sources import ImageSource
from gossamer.engine.checkpoint import Checkpoints, write_json
from gossamer.engine.distributed import is_main, rank, world
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.models.store import load, save
from gossamer.pipeline.measure import Measured, measure
from gossamer.pipeline.profiling import PROFILE, profiles
from gossamer.pipeline.setup import Setup, check_target, set_up
from gossamer.pipeline.stages import StageFolder
from gossamer.pipeline.summary import DESCRIBED, write_summary
from gossamer.recipe import PRETRAIN, Recipe
from gossamer.report.build import build_report
from gossamer.runtimes.device import device_report

__all__ = ["RunResult", "execute"]

Say = Callable[[str], None]


@dataclass
class RunResult:
    """What a run leaves behind.

    Attributes:
        model: The finished model, on the CPU.
        table: One dictionary a row: stage, runtime, precision, cost, accuracy, latency.
        run_dir: The run folder (design: recipe, metrics, edits, model, artefacts, cost, report).
        report: The HTML report.
        missed: One sentence for every bound of the target that was not met.
    """

    model: nn.Module
    table: list[dict[str, Any]]
    run_dir: Path
    report: Path | None = None
    missed: list[str] = field(default_factory=list)

    def export(self, format: str = "openvino", batch: int | str = 1) -> Path:
        """Export the finished model again; returns the artefact's graph file."""
        from gossamer.export.exporting import export

        return export(self.model, self.run_dir / "artefacts" / f"{format}-b{batch}", format=format, batch=batch).graph


def _write_inputs(setup: Setup, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(setup.recipe.to_yaml(), encoding="utf-8")
    write_json(run_dir / "environment.json", device_report())


def _stage_folder(setup: Setup, run_dir: Path) -> StageFolder:
    train = setup.recipe.train
    average = train.ema if train.ship == "ema" else None
    return StageFolder(run_dir, setup.stack, savable=setup.savable, average=average)


def _train(setup: Setup, run_dir: Path, *, resume: bool, progress: bool) -> tuple[nn.Module, StageFolder]:
    keeper = _stage_folder(setup, run_dir)
    pretrains = setup.recipe.train.pretrain is not None
    if is_main() and not pretrains and not keeper.stages():
        keeper.keep(0, "dense", setup.model, edited=False)
    latest = Checkpoints(run_dir).open(resume=resume) if pretrains else None
    dense = keeper.pretrained(latest["position"]["phase"]) if latest is not None else None
    if dense is not None:
        setup.adopt(dense)

    def on_phase_end(index: int, phase: Phase, model: nn.Module) -> None:
        if pretrains and phase.whole == PRETRAIN and phase.ends_window:
            setup.adopt(model)
            if is_main():
                keeper.keep_pretrained(index, setup.dense)
        elif is_main():
            keeper.on_phase_end(index, phase, model)

    options = RunOptions(
        resume=resume,
        identity=setup.recipe.identity(),
        quiet=not progress,
        on_phase_end=on_phase_end,
        mark_finished=False,  # measuring is part of the run
    )
    loop = Loop(
        setup.stack, setup.task, setup.loaders, setup.plan,
        settings=setup.recipe.train, run_dir=run_dir, seed=setup.recipe.seed, options=options,
    )  # fmt: skip
    model = loop.run(setup.model).eval().cpu()  # what follows, measuring in runtimes, happens there
    if is_main():
        keeper.keep(99, "finished", model)
    return model, keeper


def _costs(rows: Sequence[Measured], dense: nn.Module, finished: nn.Module) -> dict[str, Any]:
    def measured(which: str) -> dict[str, Any]:
        return {f"{r.runtime}/{r.row()['precision']}": r.row()["latency"] for r in rows if r.stage.name == which}

    return {
        "dense": {"counted": cost(dense).to_json(), "measured": measured("dense")},
        "finished": {"counted": cost(finished).to_json(), "measured": measured("finished")},
    }


def execute(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    model: nn.Module | None = None,
    methods: Sequence[Method] | None = None,
    sources: dict[str, ImageSource] | None = None,
    say: Say = lambda text: None,
) -> RunResult:
    """Carry out a recipe in ``run_dir``.

    Args:
        recipe: A validated recipe.
        run_dir: New folder, or one with an interrupted run and ``resume``.
        resume: Continue an interrupted run; a run that was interrupted after training continues
            with the measurements that are missing.
        progress: Show progress bars.
        model: Takes the place of the recipe's model.
        methods: Take the place of the recipe's methods.
        sources: Take the place of the recipe's data.
        say: Told what happens, one line at a time.

    Raises:
        GossamerError: Bad input (before anything is computed), or a failure while running.
        RunError: A bound of the target is missed; the finished model and report are kept.
    """
    setup = set_up(recipe, model=model, methods=methods, sources=sources, rank=rank(), world=world())
    trained = run_dir / "model" / "model.json"
    keeper = _stage_folder(setup, run_dir)
    checkpoints = Checkpoints(run_dir)
    state = checkpoints.open(resume=resume)  # refuses a folder that holds another run before anything is written
    if state is None and is_main():
        shutil.rmtree(keeper.folder, ignore_errors=True)  # of a run that was refused before its first step
    if state is not None and trained.is_file():
        checkpoints.check_same_run(state, {**recipe.identity(), "processes": world()})
        finished = load(run_dir / "model")
        say("training was finished earlier; measuring")
    else:
        if is_main():
            _write_inputs(setup, run_dir)
        finished, keeper = _train(setup, run_dir, resume=resume, progress=progress)
        if is_main():
            write_json(run_dir / DESCRIBED, setup.stack.describe(finished))
            if setup.savable:
                save(finished, run_dir / "model", stack=setup.stack)
    if not is_main():
        return RunResult(finished, [], run_dir)
    export = recipe.export
    rows = measure(
        keeper.stages(), setup.evaluation, setup.preprocessing, setup.task, run_dir / "artefacts", export, tick=say
    )
    write_json(run_dir / "cost.json", _costs(rows, setup.dense, finished))
    write_json(run_dir / PROFILE, profiles(rows, max(export.sizes), export.threads, setup.preprocessing.size))
    say("profiled")
    table = [r.row() for r in rows]
    write_summary(setup, keeper, table, run_dir)
    result = RunResult(finished, table, run_dir, build_report([run_dir], run_dir / "report.html"))
    checkpoints.mark_finished({"images": 0 if setup.evaluation is None else len(setup.evaluation)})
    dense, done = _figures(table, "dense"), _figures(table, "finished")
    if "score" in dense:
        done["drop"] = setup.task.metric.drop(dense["score"], done["score"])
    result.missed = check_target(recipe, dense, done)
    if result.missed:
        raise RunError(f"{run_dir}: the target is missed ({'; '.join(result.missed)}); model and report are kept")
    return result


def _figures(table: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Return the figures a target is checked against: those of a stage in the first runtime, best precision."""
    rows = [r for r in table if r["name"] == name]
    rows = [r for r in rows if r["runtime"] == rows[0]["runtime"]]
    row = rows[-1]
    batch = min(row["latency"], key=int)
    figures = {
        "macs": row["macs"], "bops": row["bops"], "params": row["params"], "size": row["file_bytes"],
        "memory": row["memory_bytes"], "latency": row["latency"][batch]["median_ms"],
    }  # fmt: skip
    if row["score"] is not None:
        figures["score"] = row["score"]
    return figures
