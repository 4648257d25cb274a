"""What a way of training costs and what it reaches: arms of one recipe, seed by seed, in one run.

    python benchmarks/training_time.py recipe.yaml --out results --seeds 3 \\
        --arm "full=" --arm "grown=methods=[{autoprog: {phase: fit}}]" --arm "short=@grown"

An arm is a name and the overrides that make it, separated by ``;``. ``@other`` is the recipe's own training (the
first arm), cut to the processor time that arm ``other`` took with the same seed. Arms alternate within a seed, so
that whatever else the machine does hits all alike; wall and processor time are both kept, since only the latter
leaves out what others took. Both count everything: reading, steps, edits, searches, checkpoints; evaluation of the
finished model is stated apart. A run that was killed goes on where it was; what is done is kept in the folder, so that
several processes can each take some arms or seeds (``--first``) and a last call prints the table of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.data.loading import batches
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.pipeline.setup import Setup, set_up
from gossamer.recipe import Recipe
from gossamer.tasks.classification import predictor


def _evaluate(setup: Setup, model: torch.nn.Module) -> dict[str, float]:
    started = (time.perf_counter(), time.process_time())
    if setup.evaluation is None:
        raise SystemExit("the recipe names no data.eval: nothing to compare")
    images = batches(setup.evaluation, eval_transform(setup.preprocessing), 250)
    top1 = 100 * setup.task.evaluate(predictor(model), images).top1
    return {
        "top1": top1,
        "evaluation_wall": time.perf_counter() - started[0],
        "evaluation_cpu": time.process_time() - started[1],
    }


def run_arm(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train and evaluate one arm; returns its figures."""
    setup = set_up(recipe)
    options = RunOptions(resume=True, identity=recipe.identity(), mark_finished=False)
    loop = Loop(
        setup.stack, setup.task, setup.loaders, setup.plan,
        settings=recipe.train, run_dir=folder, seed=recipe.seed, options=options,
    )  # fmt: skip
    model = loop.run(setup.model).eval()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [r for r in rows if r.get("event") == "end"]
    steps = [r for r in rows if "task" in r.get("terms", {})]
    return {
        **_evaluate(setup, model),
        "wall": sum(r["seconds"] for r in ends),
        "cpu": sum(r["cpu_seconds"] for r in ends),
        "steps": len(steps),
        "phases": {r["phase"]: [r["steps"], r["seconds"], r["cpu_seconds"]] for r in ends},
        "losses": [round(r["terms"]["task"], 4) for r in steps],
        "methods": setup.stack.describe(model),
    }


def _recipe(path: Path, arms: dict[str, str], name: str, seed: int, done: dict[str, dict[str, Any]]) -> Recipe:
    first, overrides, more = next(iter(arms)), arms[name], [f"seed={seed}"]
    if overrides.startswith("@"):
        steps = round(done[overrides[1:]]["cpu"] / done[first]["cpu"] * done[first]["steps"])
        overrides = arms[first]
        train = Recipe.from_yaml(path, [*filter(None, overrides.split(";"))]).train
        if train.pretrain and (train.epochs or train.steps):
            raise SystemExit(
                f"{name}: the recipe trains twice (train.pretrain and train); '@' can cut only one training"
            )
        cut = "train.pretrain" if train.pretrain else "train"
        more += [f"{cut}.epochs=null", f"{cut}.steps={steps}"]
    return Recipe.from_yaml(path, [*filter(None, overrides.split(";")), *more])


def table(results: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Return means over seeds with the spread of paired differences from the first arm."""
    names = list(results[0])
    lines = ["| arm | steps | top-1 | difference | processor time | wall time | ratio |", "| --- " * 7 + "|"]
    for name in names:
        both = [(r[name], r[names[0]]) for r in results if name in r]
        top1, gap = [a["top1"] for a, _ in both], [a["top1"] - b["top1"] for a, b in both]
        cpu, ratio = [a["cpu"] for a, _ in both], [a["cpu"] / b["cpu"] for a, b in both]
        wall = [a["wall"] for a, _ in both]
        spread = statistics.stdev(gap) if len(gap) > 1 else 0.0
        lines.append(
            f"| {name} | {both[0][0]['steps']} | {statistics.mean(top1):.2f} | {statistics.mean(gap):+.2f} "
            f"(sd {spread:.2f}) | {statistics.mean(cpu):.0f} s | {statistics.mean(wall):.0f} s "
            f"| {statistics.mean(ratio):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=OVERRIDES")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = dict(arm.split("=", 1) for arm in args.arm)
    results: list[dict[str, dict[str, Any]]] = []
    for seed in range(args.first, args.first + args.seeds):
        results.append({})
        for name in arms:
            folder = args.out / f"{name}-{seed}"
            kept = folder / "result.json"
            if not kept.is_file():
                found = run_arm(_recipe(args.recipe, arms, name, seed, results[-1]), folder)
                kept.write_text(json.dumps(found), encoding="utf-8")
            found = results[-1][name] = json.loads(kept.read_text(encoding="utf-8"))
            print(
                f"seed {seed} {name:16s} top-1 {found['top1']:.2f}  {found['cpu']:.0f} s of processor, "
                f"{found['wall']:.0f} s of wall, {found['steps']} steps",
                flush=True,
            )
    print(table(results))


if __name__ == "__main__":
    main()
