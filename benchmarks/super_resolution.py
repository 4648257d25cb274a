"""Fully quantized super-resolution against float training and LSQ on the same layers, and what int8 gains in runtimes.

    python benchmarks/super_resolution.py OUT [--data ../shared/data] [--size core] [--scales 2 4] [--part 0/4]
    python benchmarks/super_resolution.py OUT --speed [--side 128]

Trains an EDSR in float on the photographs of ``DATA/sr_train_bsds.zip`` (random patches, MATLAB's bicubic), then from
it every arm, one run folder each, and measures the finished models (integer layers) on ``DATA/sr_test.zip``. What is
done is not done again, an interrupted run goes on. ``--part i/n`` runs every n-th job, so that n processes share the
work, on a GPU where there is one; a call without it prints the tables and writes ``OUT/super_resolution_x*.json``, of
what is there already with ``--table``.
``core`` is for one core (twenty minutes a scale), ``long`` trains a smaller network for longer, in the release's 4 bits
(half an hour on one core at x2, a quarter at x4), ``evidence`` for minutes on a GPU with eight processes; ``toy``
shows in minutes of one core that it works, no more.
``--speed`` times the graphs of the float and the quantized networks side by side in both runtimes (weights do not
matter).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.models.build import load_model
from gossamer.models.store import save
from gossamer.pipeline.benching import bench
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.tasks.task import in_evaluation

MAIN = ("float", "fqsr 8", "fqsr 8, deployed with a zero", "fqsr 4", "fqsr 4, no calibration loss", "lsq 4")
"""Arms that the evidence rests on."""
FAST = ("fqsr 4, no calibration loss", "lsq 4")
"""Arms whose intervals did best ten times as fast, on photographs of the training set that nothing else saw."""
LIGHT, UNDRAWN = "fqsr 4, outputs 8, light calibration", "fqsr 4, outputs 8, no calibration loss"
LSQ_8 = "lsq 4, outputs 8"
LONG = (LIGHT, LSQ_8, UNDRAWN)
"""Arms of a longer training in the 4 bits of the release: outputs and skip connections in 8."""
SIZES: dict[str, dict[str, Any]] = {
    "toy": {"model": {"depth": 2, "width": 16}, "float": 60, "steps": 30, "batch": 4, "patch": 24, "images": 2},
    "core": {
        "model": {"depth": 4, "width": 32, "act": "prelu"},
        "photos": "[0:80]",
        "patch": {2: 24, 4: 16},
        "arms": MAIN,
        "float": {2: 2200, 4: 2500},
        "float_batch": 8,
        "float_lr": 1e-3,
        "steps": 300,
        "batch": 4,
        "lr": 1e-3,
        "own": {a: {"relative": 10} for a in FAST},
    },  # fmt: skip
    "long": {
        "model": {"depth": 2, "width": 16, "act": "prelu"},
        "photos": "[0:80]",
        "patch": {2: 24, 4: 16},
        "arms": LONG,
        "float": 8000,
        "float_batch": 8,
        "float_lr": 1e-3,
        "steps": {2: 6000, 4: 2000},
        "first": {2: 4, 4: 0},
        "batch": 4,
        "lr": 1.5e-3,
        "own": {a: {"relative": 3} for a in LONG},
    },  # fmt: skip
    "evidence": {"model": {"depth": 8, "width": 32}, "float": 4000, "steps": 1500, "arms": MAIN},
    "short": {"model": {"depth": 8, "width": 32}, "float": 6000, "steps": 2000},
    "full": {"float": 20000, "steps": 5000},
}
COMMON = {
    "model": {}, "photos": "", "batch": 16, "patch": 48, "images": 100, "lr": 1e-4, "float_lr": 4e-4, "own": {},
    "first": 0,
}  # fmt: skip
SETS = {2: ("Set5", "Set14", "BSD100"), 4: ("Set5", "Set14", "BSD100", "Urban100")}
LSQ = {"grid": "midtread", "start": "lsq", "grad_scale": True, "alpha": 0.0}
"""LSQ (arXiv 1902.08153) on the same layers, with its own start and its gradient scale."""
PAIRS = (("fqsr 8", "float"), ("fqsr 8, deployed with a zero", "float"), ("fqsr 4", "lsq 4"),
         ("fqsr 4", "fqsr 4, no calibration loss"), ("fqsr 4, no calibration loss", "lsq 4"),
         (LIGHT, LSQ_8), (UNDRAWN, LSQ_8), (LIGHT, UNDRAWN))  # fmt: skip
"""What is compared, seed by seed."""
SEEDS = 3
ONCE = ("naive",)
"""Arms that need no second seed."""


def _bits(w: int, a: int, o: int) -> dict[str, int]:
    return {"weight_bits": w, "input_bits": a, "output_bits": o}


def arms() -> dict[str, dict[str, Any] | None]:
    """Return the options of the method for every arm; ``None`` trains the float model for as long."""
    return {
        "float": None,
        "fqsr 8": _bits(8, 8, 8),
        "fqsr 8, deployed with a zero": {**_bits(8, 8, 8), "deployment": "midtread", "deployment_share": 0.2},
        "fqsr 6": _bits(6, 6, 6),
        "fqsr 4": _bits(4, 4, 4),
        "fqsr 4, no calibration loss": {**_bits(4, 4, 4), "alpha": 0.0},
        "lsq 4": {**_bits(4, 4, 4), **LSQ},
        "fqsr 4, outputs 8": _bits(4, 4, 8),
        LIGHT: {**_bits(4, 4, 8), "alpha": 0.003},
        UNDRAWN: {**_bits(4, 4, 8), "alpha": 0.0},
        LSQ_8: {**_bits(4, 4, 8), **LSQ},
        "naive 4": {**_bits(4, 4, 4), "start": "one", "alpha": 0.0},
    }


def recipe(model: Any, data: Path, size: dict[str, Any], **rest: Any) -> Recipe:
    """Return the recipe of one run."""
    settings = {"batch_size": size["batch"], "optimizer": "adam", "weight_decay": 0.0, "min_lr_ratio": 0.0,
                "checkpoint_every": 500}  # fmt: skip
    return Recipe(
        model=model, task={"super_resolution": {"patch": size["patch"]}},
        data={"train": f"zip:{data / 'sr_train_bsds.zip'}{size['photos']}", "workers": size["workers"]},
        methods=rest.get("methods", []), train={**settings, "steps": rest["steps"], "lr": rest["lr"]},
        seed=rest.get("seed", 0),
    )  # fmt: skip


def trained(run: Recipe, folder: Path) -> tuple[torch.nn.Module, Any]:
    """Return the finished model and the set-up of a run, which goes on where it was interrupted."""
    ready = set_up(run)
    options = RunOptions(resume=True, identity=run.identity(), mark_finished=False, quiet=False)
    loop = Loop(
        ready.stack, ready.task, ready.loaders, ready.plan,
        settings=run.train, run_dir=folder, seed=run.seed, options=options,
    )  # fmt: skip
    return loop.run(ready.model), ready


def scores(model: torch.nn.Module, ready: Any, data: Path, scale: int, images: int) -> dict[str, float]:
    """Return PSNR on the luma of every test set, whole pictures."""
    found = {}
    for name in SETS[scale]:
        source = ready.task.open(f"zip:{data / 'sr_test.zip'}#{name}/HR[0:{images}]")
        batches = ready.task.batches(source, ready.preprocessing, 1)
        found[name] = round(ready.task.evaluate(in_evaluation(model), batches).score, 4)
    return found


def run_folder(out: Path, scale: int, arm: str, seed: int) -> Path:
    """Return the folder of one run."""
    return out / f"x{scale}" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def one(out: Path, data: Path, size: dict[str, Any], scale: int, arm: str, seed: int) -> dict[str, Any]:
    """Run one arm for one seed, or read what an earlier call found."""
    folder = run_folder(out, scale, arm, seed)
    done = folder / "result.json"
    if not done.is_file():
        options = arms()[arm]
        methods = [] if options is None else [{"fqsr": {"relative": 1, **options, **size["own"].get(arm, {})}}]
        dense = str(out / f"x{scale}" / "model")
        run = recipe(dense, data, size, methods=methods, steps=size["steps"], lr=size["lr"], seed=seed)
        model, ready = trained(run, folder)
        found: dict[str, Any] = scores(model, ready, data, scale, size["images"])
        if methods:
            found["bops"] = next(iter(ready.stack.describe(model).values()))["facts"]["BOPs per image"]
            save(model.cpu(), folder / "model", stack=ready.stack)
        done.write_text(json.dumps(found))
    return json.loads(done.read_text())


def float_model(out: Path, data: Path, size: dict[str, Any], scale: int) -> None:
    """Train the float model once."""
    folder = out / f"x{scale}" / "model"
    if not (folder / "model.json").is_file():
        start = {"name": f"edsr_baseline_x{scale}", "options": size["model"]}
        own = {**size, "batch": size.get("float_batch", size["batch"])}
        run = recipe(start, data, own, steps=size["float"], lr=size["float_lr"])
        model, ready = trained(run, folder.parent / "training")
        found = scores(model, ready, data, scale, size["images"])
        (folder.parent / "float.json").write_text(json.dumps(found))
        save(model.cpu(), folder)


def of_scale(size: dict[str, Any], scale: int) -> dict[str, Any]:
    """Return the settings of one scale: those that differ stand by scale."""
    return {k: v[scale] if isinstance(v, dict) and scale in v else v for k, v in size.items()}


def _part(given: argparse.Namespace) -> tuple[int, int]:
    part, parts = (given.part or "0/1").split("/")
    return int(part), int(parts)


def jobs(size: dict[str, Any], only: list[str]) -> list[tuple[str, int]]:
    """Return the (arm, seed) to run."""
    chosen = [a for a in size.get("arms") or arms() if not only or a in only]
    first = size["first"]
    return [(a, first + k) for k in range(size["seeds"]) for a in chosen if not k or not a.startswith(ONCE)]


def accuracy(out: Path, data: Path, size: dict[str, Any], scale: int, given: argparse.Namespace) -> None:
    """Run this process's part for one scale; without parts, print mean and deviation over the seeds."""
    part, parts = _part(given)
    while not (out / f"x{scale}" / "model" / "model.json").is_file():
        time.sleep(2)  # another process trains it
    table: dict[str, list[dict[str, Any]]] = {}
    for k, (arm, seed) in enumerate(jobs(size, given.only)):
        if k % parts == part and (not given.table or (run_folder(out, scale, arm, seed) / "result.json").is_file()):
            table.setdefault(arm, []).append(one(out, data, size, scale, arm, seed))
    if given.part:
        return
    print(f"x{scale} before", (out / f"x{scale}" / "float.json").read_text(), flush=True)
    for arm, rows in table.items():
        columns = {k: [r[k] for r in rows] for k in rows[0]}
        shown = {k: (round(statistics.mean(v), 3), round(statistics.pstdev(v), 3)) for k, v in columns.items()}
        print(f"x{scale} {arm:30} {len(rows)} seeds", shown, flush=True)
    for one_arm, other in PAIRS:
        both = list(zip(table.get(one_arm, []), table.get(other, []), strict=False))
        gaps = {k: [a[k] - b[k] for a, b in both] for k in SETS[scale]} if both else {}
        for name, each in gaps.items():
            print(f"x{scale} {one_arm} - {other}: {name} {statistics.mean(each):+.3f}", [round(g, 3) for g in each])
    (out / f"super_resolution_x{scale}.json").write_text(json.dumps(table, indent=1))


def speed(out: Path, size: dict[str, Any], scale: int, side: int) -> None:
    """Time float and quantized graphs side by side; the quantized ones are calibrated, not trained."""
    rows = []
    for name in (f"edsr_baseline_x{scale}", f"srresnet_x{scale}"):
        options = {**(size["model"] if name.startswith("edsr") else {}), "img_size": side}
        dense = load_model(name, **options).eval()
        shapes = {"float": dense}
        for label, choice in (("fqsr 8", {}), ("fqsr 8, with a zero", {"deployment": "midtread"})):
            shapes[label] = _calibrated(name, options, choice, side)
        for runtime in ("openvino", "onnxruntime"):
            found = bench(list(shapes.values()), batch=[1], threads=2, runtimes=[runtime], precision=None, rounds=7)
            each = len(found) // len(shapes)
            for k, row in enumerate(found):
                rows.append({"network": name, "arm": list(shapes)[k // each], **row})
                print({k: rows[-1][k] for k in ("network", "arm", "runtime", "precision", "median_ms", "ratio",
                                                "ratio_best_dense", "trusted")}, flush=True)  # fmt: skip
    (out / f"speed_x{scale}_{side}.json").write_text(json.dumps(rows, indent=1))


def _calibrated(name: str, options: dict[str, Any], choice: dict[str, Any], side: int) -> torch.nn.Module:
    from gossamer.core import registry
    from gossamer.kits.calibration import calibrate

    method = registry.build("fqsr", {"warmup": 1, **choice})
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return calibrate(method, load_model(name, **options), images).eval()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--size", choices=SIZES, default="short")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", nargs="+", default=[], choices=arms(), help="these arms")
    parser.add_argument("--part", default="", help="i/n")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--side", type=int, default=128, help="low-resolution side of the timed graphs")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    size = {**COMMON, **SIZES[given.size], "workers": given.workers, "seeds": given.seeds}
    part, parts = _part(given)
    for k, scale in enumerate(given.scales if not (given.speed or given.table) else ()):
        if k % parts == part:  # the others wait for it
            float_model(given.out, given.data, {**of_scale(size, scale), "workers": 4 * given.workers}, scale)
    for scale in given.scales:
        if given.speed:
            speed(given.out, of_scale(size, scale), scale, given.side)
        else:
            accuracy(given.out, given.data, of_scale(size, scale), scale, given)


if __name__ == "__main__":
    main()
