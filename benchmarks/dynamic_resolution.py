"""DRNet against fixed resolutions on CIFAR-10 images: accuracy in the runtimes and milliseconds an image at batch 16.

    python benchmarks/dynamic_resolution.py train OUT [--size small] [--seeds 0 1] [--nets drnet]
    python benchmarks/dynamic_resolution.py measure OUT ...
    python benchmarks/dynamic_resolution.py speed OUT [--net resnet18]

``train`` trains every net once a seed (on the GPU if there is one); what is done is not done again, an interrupted
training goes on. ``measure`` exports them, evaluates them in OpenVINO and ONNX Runtime on the CPU and times them side
by side on real test images, 16 a call; results in ``OUT/SIZE.json``. Sizes: ``toy`` (a minute, says nothing), ``small``
(11 minutes of one core, one seed), ``long`` (20), ``gpu`` (eight epochs of all images, and the ablations).

``speed`` needs no training: a net with untrained weights and the predictor of the paper, a third of the images at each
of 224, 168 and 112 pixels, against the net at 224; predicted by MACs and measured.

All nets of a seed go on from one net, trained at the full size, with the same number of steps; DRNet spends 0.85 of
them on all sizes at once (0.7 of 1.7 as published), each of which costs 1.8 steps of the full size: the fixed
net of ``long`` takes the time of the DRNet of ``small``. Fixed nets are exported for exactly 16 images, which suits
them best.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.cost.latency import bench
from gossamer.cost.ledger import cost
from gossamer.data.loading import batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.export.exporting import export_once
from gossamer.methods.drnet import DRNet
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.models.source import attach, inherit, source_of
from gossamer.models.store import load, save
from gossamer.ops.routing import Resized, Routed
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe
from gossamer.runtimes import as_recorded, get
from gossamer.runtimes.device import device_key
from gossamer.runtimes.routed import RoutedSession

FULL = 48
"""Pixels of the largest size, 1.5 times the images' own: with 3/4 and 1/2 of it these are 48, 36 and 24."""
AUGMENT = {"scale": [0.6, 1.0], "ratio": [0.9, 1.1], "color_jitter": None}
CALL, CALLS = 16, 8
"""Images a call, and different calls that a timed run goes through."""
START = "start"
"""The net at its full size that the others go on from, as the method is given one that is trained."""
SIZES: dict[str, dict[str, Any]] = {
    "toy": {"net": "preact_resnet8", "images": 1000, "start": 8, "steps": 34, "batch": 32, "test": 400, "workers": 0},
    "small": {
        "net": "preact_resnet8", "images": 40000, "start": 1200, "steps": 1200, "batch": 64, "test": 8000, "workers": 0,
    },
    "long": {
        "net": "preact_resnet8", "images": 40000, "start": 1200, "steps": 2196, "batch": 64, "test": 8000, "workers": 0,
    },
    "gpu": {
        "net": "preact_resnet20", "images": 50000, "start": 3000, "steps": 3000, "batch": 128, "test": 8000,
        "workers": 12,
    },
}  # fmt: skip
OURS = {"joint_lr": 0.01, "predictor_lr": 0.05, "eta": 1.0, "credit": "expected", "calibrate": True}
"""Where the training differs from the published one."""
NETS: dict[str, dict[str, Any]] = {
    START: {"side": FULL},
    "fixed 48": {"side": FULL},
    "drnet": {"macs": "60%", **OURS},
    "fixed 36": {"side": 36},
    "fixed 24": {"side": 24},
    "drnet, as published": {"macs": "60%", "predictor_lr": 0.01},
    "drnet, shared norms": {"macs": "60%", **OURS, "resolution_norm": False},
}
CHEAP = ("fixed 48", "drnet", "fixed 36", "fixed 24")
"""What the sizes for one core train."""


def nets(size: str) -> list[str]:
    """Return the nets of a size."""
    return [n for n in NETS if n != START] if size == "gpu" else list(CHEAP)


def recipe(size: str, name: str, seed: int, data: Path) -> Recipe:
    """Return the recipe of one net."""
    given, options = SIZES[size], dict(NETS[name])
    steps = joint = given["start" if name == START else "steps"]
    methods: list[dict[str, Any]] = []
    if "side" not in options:
        joint = round(steps * (0.15 if "joint_lr" in options else 1 / 1.7))
        own = {"predictor": "small", "count_batches": 40, "multires_steps": steps - joint}
        methods = [{"drnet": {**own, **options}}]
    return Recipe(
        model={"name": given["net"], "num_classes": 10},
        data={
            "train": f"npz:{data}/cifar10_train_50000_q95.npz[0:{given['images']}]", "augment": AUGMENT,
            "workers": given["workers"],
        },
        methods=methods,
        train={
            "steps": joint, "batch_size": given["batch"], "optimizer": "sgd",
            "lr": 0.1 if name == START else 0.05, "weight_decay": 5e-4, "warmup": 0.05,
            "checkpoint_every": 100, "precision": "bf16",
        },
        seed=seed,
    )  # fmt: skip


def place(out: Path, size: str, name: str, seed: int) -> Path:
    """Return the run folder of one net."""
    return out / f"{size}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def begun(out: Path, size: str, name: str, seed: int) -> nn.Module:
    """Return the net to train, told that its input has ``FULL`` pixels; its memory format is the CPU's fastest."""
    if name != START:
        net = load(place(out, size, START, seed) / "model")
    else:
        net = load_model(SIZES[size]["net"], num_classes=10)
        attach(net, replace(source_of(net), preprocessing=replace(preprocessing(net), size=(3, FULL, FULL))))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def at_side(net: nn.Module, name: str) -> nn.Module:
    """Return a fixed net at its resolution."""
    side = NETS[name].get("side", FULL)
    return net if side == FULL else inherit(Resized(net, (side, side)), net)


def train(out: Path, size: str, seed: int, data: Path, only: list[str] | None = None) -> None:
    """Train what is not trained yet (of ``only``)."""
    for name in (START, *(only or nets(size))):
        folder, run = place(out, size, name, seed), recipe(size, name, seed, data)
        if (folder / "model" / "model.json").is_file():
            continue
        torch.manual_seed(seed)
        ready = set_up(run, model=at_side(begun(out, size, name, seed), name))
        options = RunOptions(resume=True, identity=run.identity(), quiet=True)
        loop = Loop(
            ready.stack, ready.task, ready.loaders, ready.plan,
            settings=run.train, run_dir=folder, seed=seed, options=options,
        )  # fmt: skip
        model = loop.run(ready.model).cpu()
        inner = model.module if isinstance(model, Resized) else model
        save(inner, folder / "model", stack=ready.stack if run.methods else None)
        (folder / "described.json").write_text(json.dumps(ready.stack.describe(model)))
        print(f"{folder.name}: trained", flush=True)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of many images."""
    return torch.cat([model(part) for part in images.split(200)])


def routing(model: Routed, images: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return how well the router chooses: against every size alone, random choice, and the smallest correct size."""
    right = torch.stack([logits(b, images).argmax(1) == targets for b in model.branches], 1)
    chosen = logits(model.router, images).argmax(1)
    shares = torch.bincount(chosen, minlength=len(model.branches)) / len(chosen)
    by_class = [torch.bincount(chosen[targets == c], minlength=len(model.branches)).tolist() for c in range(10)]
    alone = 100 * right.float().mean(0)
    return {
        "shares": shares.tolist(),
        "learned": 100 * right.gather(1, chosen[:, None]).float().mean().item(),
        "random at the same shares": float((shares * alone).sum()),
        "every size alone": dict(zip(model.names, alone.tolist(), strict=True)),
        "some size right": 100 * right.any(1).float().mean().item(),
        "images by class and size": by_class,
    }


def measure(out: Path, size: str, seeds: list[int], data: Path) -> dict[str, Any]:
    """Export, evaluate and time all nets; returns the table."""
    test = open_data(f"npz:{data}/cifar10_test_8000.npz[0:{SIZES[size]['test']}]")
    table: dict[str, Any] = {"machine": device_key(), "threads": 1, "seeds": {}}
    for seed in seeds:
        done = [n for n in NETS if n != START and (place(out, size, n, seed) / "model" / "model.json").is_file()]
        models = {n: at_side(load(place(out, size, n, seed) / "model"), n) for n in done}
        pre = preprocessing(next(iter(models.values())))
        loaded = list(batches(test, eval_transform(pre), 200))
        images, targets = torch.cat([b["image"] for b in loaded]), torch.cat([b["target"] for b in loaded])
        rows: dict[str, Any] = {n: {"macs": cost(m, (3, FULL, FULL), saved=False).macs} for n, m in models.items()}
        for name, model in models.items():
            if isinstance(model, Routed):
                rows[name]["routing"] = routing(model, images, targets)
        for runtime, kind in (("openvino", "openvino"), ("onnxruntime", "onnx")):
            sessions = {}
            for name, model in models.items():
                folder = place(out, size, name, seed) / f"export-{kind}-{CALL}"
                graph = export_once(model, folder, format=kind, batch=CALL).graph
                sessions[name] = get(runtime).load(graph, precision="f32", threads=1)
            in_runtime(sessions, images, targets, rows, runtime)
        table["seeds"][seed] = rows
        (out / f"{size}.json").write_text(json.dumps(table, indent=1))
    return table


def in_runtime(sessions: dict[str, Any], images: Tensor, targets: Tensor, rows: dict[str, Any], runtime: str) -> None:
    """Fill in accuracy, and milliseconds an image from one interleaved run over real images."""
    whole = len(images) - len(images) % CALL
    calls = [part.numpy() for part in images[:whole].split(CALL)]
    for name, session in sessions.items():
        answers = torch.from_numpy(np.concatenate([session.run(x) for x in calls])).argmax(1)
        rows[name][runtime] = {"top1": 100 * (answers == targets[:whole]).float().mean().item()}
        if isinstance(session, RoutedSession):
            rows[name][runtime]["taken"] = dict(zip(session.names, session.taken, strict=True))

    def through(session: Any) -> Any:
        return lambda xs: [session.run(x) for x in xs]

    chosen = calls[:: max(1, len(calls) // CALLS)][:CALLS]
    timings = bench([through(s) for s in sessions.values()], [chosen] * len(sessions), rounds=9, names=list(sessions))
    for timing in timings:
        rows[timing.name][runtime] |= {
            "ms_per_image": timing.median_ms / (CALL * len(chosen)), "full_over_this": timing.ratio,
            "quartiles": timing.ratio_quartiles, "trusted": timing.trusted, "reason": timing.reason,
        }  # fmt: skip


def routed_net(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a net of 224 pixels and its routed form with equal shares."""
    net = load_model(name)
    method = DRNet(count_batches=1)
    wrapped = method.apply(load_model(name), method._decide(net))
    for edit in ({"do": "route"}, {"do": "finish", "shares": [1 / 3] * 3}):
        wrapped = method.apply(wrapped, edit)
    return net.eval(), wrapped.eval()


def speed(out: Path, name: str) -> None:
    """Time the routed form of a net against the net, ``CALL`` images a call."""
    models = dict(zip(("fixed", "routed"), routed_net(name), strict=True))
    macs = {n: cost(m, saved=False).macs for n, m in models.items()}
    rows: dict[str, Any] = {"machine": device_key(), "threads": 1, "macs": macs}
    rows["predicted"] = macs["fixed"] / macs["routed"]
    x = np.random.default_rng(0).standard_normal((CALL, 3, 224, 224), dtype=np.float32)
    for runtime, kind in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        graphs = [export_once(m, out / f"{name}-{n}-{kind}", format=kind, batch=CALL).graph for n, m in models.items()]
        for precision in get(runtime).precisions():
            sessions = [as_recorded(get(runtime).load(g, precision=precision, threads=1)) for g in graphs]
            fixed, routed = bench(sessions, x, rounds=3, warmup=1, burst_s=0.0)
            rows[f"{runtime}/{precision}"] = {
                "fixed_ms": fixed.median_ms, "routed_ms": routed.median_ms, "ratio": routed.ratio,
                "quartiles": routed.ratio_quartiles, "trusted": routed.trusted, "reason": routed.reason,
            }  # fmt: skip
    (out / f"speed-{name}.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))


def show(table: dict[str, Any]) -> None:
    """Print one line a net, runtime and seed."""
    for seed, rows in table["seeds"].items():
        for name, row in rows.items():
            for runtime in ("openvino", "onnxruntime"):
                r = row[runtime]
                print(
                    f"seed {seed}  {name:20} {row['macs'] / 1e6:7.2f} M  {runtime:12} top-1 {r['top1']:.2f}  "
                    f"{1000 * r['ms_per_image']:8.1f} us/image  {100 / r['full_over_this'] - 100:+.1f} %"
                    f"{'' if r['trusted'] else '  NOT TRUSTED: ' + r['reason']}"
                )
            if "routing" in row:
                print("   ", {k: v for k, v in row["routing"].items() if "class" not in k})


def main() -> None:
    """Train or measure, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "speed"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS))
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if given.what == "speed":
        speed(given.out, given.net)
    elif given.what == "measure":
        show(measure(given.out, given.size, given.seeds, given.data))
    for seed in given.seeds if given.what == "train" else ():
        train(given.out, given.size, seed, given.data, given.nets)


if __name__ == "__main__":
    main()
