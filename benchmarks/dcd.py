"""DCD on CIFAR-10: a narrow generator alone, with plain feature distillation, and with DCD; at equal MACs and steps.

    python benchmarks/dcd.py --data ../shared/data --out runs/dcd                 # everything, one after the other
    python benchmarks/dcd.py --data ../shared/data --out runs/dcd --jobs 12       # on a GPU: all arms side by side
    python benchmarks/dcd.py --data ../shared/data --out runs/dcd --table         # the table of what is there
    python benchmarks/dcd.py --data ../shared/data --out runs/dcd --speed         # published sizes in the runtimes

Two tasks: ``pairs`` (pix2pix: grey to colour, 5,000 training photographs of all classes; ``--inputs edges`` is
harder) and ``domains`` (CycleGAN: horses to deer, 5,000 each), both by a U-Net. Two figures in the features of a
ViT-Ti/16, which no arm is trained with (its perceptual network is an EfficientNet-Lite0): the Frechet distance of the
pictures made of the 5,000 training inputs, and the kernel distance on 800 test inputs. Neither is the standard FID or
KID. Arm ``input`` scores the pictures as they come: what there is to beat. Uses CUDA if present; an arm that was
interrupted goes on where it stopped, a finished one is not run again. The default sizes are for one core (one to four
minutes of processor time an arm, and one to score it). The pairs were first run with a MobileResNet, whose pictures
stayed blurred; its figures come from

    python benchmarks/dcd.py --data ../shared/data --out runs/dcd-mobile --tasks pairs --seeds 3 \\
        --network mobile_resnet_3blocks --kind hinge --recon 100 --raw 1 --batch 4 --lr 2e-3 --steps 1200
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import gossamer as gs
from gossamer.core.method import Method
from gossamer.core.schedule import Batch, Loader, Phase, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.data.pairs import PairTransform, open_pairs, pair_sources
from gossamer.data.sources import open_data, take
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.kits.adversarial import drawn_with
from gossamer.kits.teacher import bind_self
from gossamer.methods.cyclegan import CycleGAN
from gossamer.methods.dcd import DCD
from gossamer.methods.pix2pix import Pix2Pix
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.recipe import TrainSettings
from gossamer.tasks.features import Extractor, distances, diversity
from gossamer.tasks.image_translation import ImageTranslation, to_unit

HORSE, DEER = 7, 4
EXTRACTOR, PERCEPTUAL = "vit_tiny_patch16_224@embedded", "tf_efficientnet_lite0"
SEEN = 96  # side at which the extractor sees pictures: three times theirs, and a fifth of the work of its usual 224
DEPTHS = ["net.bn1", "net.blocks.0.0", "net.blocks.1.1", "net.blocks.2.1"]
ARMS = ("input", "teacher", "alone", "plain", "plain_gan", "dcd", "dcd_without_gan", "images")
TASKS = ("pairs", "domains")
USUAL: dict[str, dict[str, Any]] = {
    "pairs": {"network": "unet_32", "width": 8, "steps": 1500, "lr": 1e-3},
    "domains": {"network": "unet_32", "width": 6, "steps": 1000, "lr": 2e-3},
}
TAPS = {"unet_32": [0, 3]}  # the others are 2 pixels small, too few for a discriminator; every arm compares these
TEACHER, SIZE = 24, 32
JUDGE = {"layers": 1, "ndf": 16}


def settled(args: argparse.Namespace, task: str) -> argparse.Namespace:
    """Return the settings of a task: what was asked for, else its usual ones."""
    usual = {k: v for k, v in USUAL[task].items() if getattr(args, k) is None}
    return argparse.Namespace(**{**vars(args), **usual})


def pictures(args: argparse.Namespace, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Return inputs and real pictures of the second domain, each [N, 3, 32, 32] in [-1, 1]."""
    file = "cifar10_train_50000_q95.npz" if split == "train" else "cifar10_test_8000.npz"
    count = min(args.images, 5000 if split == "train" else 800)
    spec = f"npz:{args.data}/{file}"
    if task == "pairs":
        source = open_pairs(f"{args.inputs}:{spec}[0:{count}]")
    else:
        whole = open_data(spec)
        first, second = ([i for i, k in enumerate(whole.labels) if k == c][:count] for c in (HORSE, DEER))
        source = pair_sources(take(whole, first), take(whole, second), paired=True)  # both in order, once each
    view = PairTransform(preprocessing(load_model(args.network, width=1, img_size=SIZE)))
    read = [view(source[i].image) for i in range(len(source))]
    return torch.stack([r["image"] for r in read]), torch.stack([r["target"] for r in read])


def loader(first: Tensor, second: Tensor, batch: int, paired: bool) -> Loader:
    """Return random batches, flipped half of the time; pairs stay together."""

    def draw(step: Step) -> Batch:
        random = step.generator("pictures")
        rows = torch.randint(len(first), (batch,), generator=random)
        others = rows if paired else torch.randint(len(second), (batch,), generator=random)
        flips = torch.rand(2, batch, generator=random) < 0.5
        sides = zip((first[rows], second[others]), (flips[0], flips[0] if paired else flips[1]), strict=True)
        a, b = (torch.where(f.view(-1, 1, 1, 1), x.flip(-1), x) for x, f in sides)
        return {"image": a, "target": b, "id": [str(r) for r in rows.tolist()]}

    return draw


class Doubled(nn.Module):
    """A network that sees pictures at twice their size, so that its first features are as fine as the pictures."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.pretrained_cfg = net, net.pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features [B, C, h, w] of pictures [B, 3, H, W]."""
        return self.net.forward_features(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


def extractor() -> Extractor:
    """Return the feature network that figures are taken with."""
    net = load_model(EXTRACTOR, img_size=SEEN)
    pre = preprocessing(net)
    return Extractor(net, f"{EXTRACTOR.partition('@')[0]} at {SEEN}", (SEEN, SEEN), pre.mean, pre.std)


def methods(args: argparse.Namespace, task: str, arm: str, seed: int) -> list[Method]:
    """Return the methods of an arm."""
    paired = task == "pairs"
    if arm in ("alone", "teacher"):
        plain = {**JUDGE, "seed": seed}
        if not paired:
            return [CycleGAN(lambda_cycle=(args.cycle, args.cycle), lambda_identity=args.identity, **plain)]
        return [Pix2Pix(gan=args.kind, norm="instance", lambda_recon=args.recon, **plain)]
    perceptual = Doubled(load_model(f"{PERCEPTUAL}@{args.data}/weights/{PERCEPTUAL}_fp16.safetensors"))
    raw = {"features": "raw", "lambda_dcd": args.raw}
    own: dict[str, Any] = {
        "plain": {**raw, "lambda_gan": 0.0, "d_fakes": "teacher"},
        "plain_gan": raw,
        "images": {"features": "images"},
        "dcd": {},
        "dcd_without_gan": {"lambda_gan": 0.0, "d_fakes": "teacher"},
    }[arm]
    return [
        DCD(
            width=args.width, paired=paired, perceptual=perceptual, perceptual_paths=DEPTHS, perceptual_norm=True,
            cycles=args.cycles, student_ratio=args.ratio, lambda_style=args.style, lambda_feature=args.feature,
            gan=args.kind if paired else None, lambda_recon=args.recon, lambda_task=args.recon if paired else 0.0,
            lambda_cycle=(args.cycle, args.cycle), lambda_identity=args.identity, taps=TAPS.get(args.network),
            **{"lambda_gan": args.gan, "lambda_dcd": args.weight, **own}, seed=seed, **JUDGE,
        )
    ]  # fmt: skip


def train(args: argparse.Namespace, task: str, arm: str, seed: int, folder: Path) -> nn.Module:
    """Train an arm, or go on with it; returns the generator that is deployed."""
    if arm == "input":  # the pictures as they come: what has to be improved on
        return nn.Identity()
    torch.manual_seed(seed)
    model, paired = load_model(args.network, width=TEACHER, img_size=SIZE), task == "pairs"
    if arm == "alone":
        with drawn_with(seed + 1):  # the weights that the distilled students start from
            model.set_width(args.width)
    first, second = pictures(args, task, "train")
    draw = loader(first, second, args.batch, paired)
    stack = Stack(methods(args, task, arm, seed))
    steps = round(args.ratio * args.steps) if arm == "alone" and not paired else args.steps
    settings = TrainSettings(steps=steps, batch_size=args.batch, lr=args.lr, checkpoint_every=max(50, steps // 10))
    bind_self(stack, model)
    distils = any(isinstance(m, DCD) for m in stack.methods)
    rates = dict.fromkeys(("weights", "connectors"), args.student_rate * args.lr) if distils else None
    phase = Phase("fit", steps, schedule="linear", hold=0.5, min_lr_ratio=0.01, lr=rates)
    loop = Loop(
        stack, ImageTranslation(paired=paired), {"train": draw, "search": draw}, [phase], settings=settings,
        run_dir=folder, seed=seed, options=RunOptions(resume=True, mark_finished=False, quiet=args.quiet),
    )  # fmt: skip
    return loop.run(model)


@torch.no_grad()
def features(see: Extractor, images: Tensor, model: nn.Module | None = None) -> Tensor:
    """Return the features of pictures, or of what ``model`` makes of them."""
    device = see.mean.device
    found = []
    for part in images.split(100):
        x = part.to(device)
        found.append(see(to_unit(x if model is None else model(x))))
    return torch.cat(found)


def real_features(args: argparse.Namespace, task: str, split: str, see: Extractor, pictures: Tensor) -> Tensor:
    """Return the features of the real pictures; computed once for all arms."""
    kept = args.out / f"real-{task}-{split}-{len(pictures)}.pt"
    if not kept.is_file():
        part = kept.with_suffix(f".{os.getpid()}")  # another arm may be at it
        torch.save(features(see, pictures).cpu(), part)
        part.replace(kept)
    return torch.load(kept, weights_only=True).to(see.mean.device)


def score(args: argparse.Namespace, task: str, model: nn.Module) -> dict[str, Any]:
    """Return the figures of a generator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, see = model.to(device).eval(), extractor().to(device)
    found: dict[str, Any] = {"extractor": see.name}
    for split in ("train", "test"):
        first, second = pictures(args, task, split)
        made = features(see, first, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the test set only the kernel distance is used
            values = distances(made, real_features(args, task, split, see, second), see.name)
        found |= {f"{split}_frechet": values.fid, f"{split}_kernel": values.kid, f"{split}_kernel_std": values.kid_std}
        found[f"{split}_diversity"] = diversity(made)
        if task == "pairs":
            with torch.no_grad():
                out = torch.cat([model(x.to(device)).cpu() for x in first.split(100)])
            found[f"{split}_l1"] = float((to_unit(out) - to_unit(second)).abs().mean())
    counted = cost(model.cpu(), (3, SIZE, SIZE), saved=False)
    return {**found, "macs": counted.macs, "params": counted.params}


@torch.no_grad()
def draw_grid(args: argparse.Namespace, task: str, model: nn.Module, file: Path, count: int = 16) -> None:
    """Save a picture of test inputs (top), what a generator makes of them and, of pairs, the real pictures."""
    first, second = (x[:: max(1, len(x) // count)][:count] for x in pictures(args, task, "test"))
    rows = [first, model.cpu().eval()(first), *([second] if task == "pairs" else [])]
    grid = torch.cat([torch.cat(list(to_unit(r)), 2) for r in rows], 1)
    Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()).save(file)


def one(args: argparse.Namespace, task: str, arm: str, seed: int) -> None:
    """Run and score an arm unless it has been."""
    place = args.out / f"{task}-{arm}-{seed}"
    result = place / "result.json"
    if result.is_file():
        return
    args = settled(args, task)
    torch.set_num_threads(max(1, args.threads))
    start = time.process_time()
    model = train(args, task, arm, seed, place / "run")
    trained = time.process_time() - start
    row = {"task": task, "arm": arm, "seed": seed, **score(args, task, model), "processor_seconds": trained}
    place.mkdir(parents=True, exist_ok=True)
    draw_grid(args, task, model, place / "grid.png")
    names = ("batch", "images", "style", "feature", "weight", "raw", "gan", "kind", "recon", "cycles", "inputs")
    row["settings"] = {
        k: getattr(args, k) for k in (*USUAL[task], *names, "cycle", "identity", "ratio", "student_rate")
    }
    result.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(f"{task} {arm} seed {seed}: {row['train_frechet']:.2f}, kernel {row['test_kernel']:.4f}", flush=True)


def table(args: argparse.Namespace) -> str:
    """Return the results so far as a Markdown table, one row an arm."""
    rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(args.out.glob("*/result.json"))]
    lines = [
        "| task | arm | MMACs | Frechet, 5,000 training | kernel, 800 test | diversity | seeds |",
        "|" + " --- |" * 7,
    ]
    for task in TASKS:
        for arm in ARMS:
            mine = [r for r in rows if (r["task"], r["arm"]) == (task, arm)]
            if mine:
                cells = []
                for key in ("train_frechet", "test_kernel"):
                    values = [r[key] for r in mine]
                    cells.append(f"{statistics.mean(values):.3g} ({', '.join(f'{v:.3g}' for v in values)})")
                spread = f"{statistics.mean(r['test_diversity'] for r in mine):.2f}"
                row = [task, arm, f"{mine[0]['macs'] / 1e6:.1f}", *cells, spread, str(len(mine))]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def speed(args: argparse.Namespace) -> str:
    """Time the published teacher and student (64 and 16 channels, 256 x 256, batch 1) side by side."""
    pair = [load_model("mobile_resnet_9blocks", width=w) for w in (64, 16)]
    found = gs.bench(pair, batch=(1,), threads=max(1, args.threads), runtime=["openvino", "onnxruntime", "torch"])
    (args.out / "speed.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    lines = ["| model | runtime | precision | ms | IQR | first / this | trusted |", "|" + " --- |" * 7]
    for row in found:
        cells = [f"{row[k]:.2f}" for k in ("median_ms", "iqr_ms", "ratio")]
        trusted = "yes" if row.get("trusted", True) else "no"
        lines.append(f"| {row['model']} | {row['runtime']} | {row['precision']} | {' | '.join(cells)} | {trusted} |")
    return "\n".join(lines)


def together(args: argparse.Namespace, wanted: list[tuple[str, str, int]]) -> None:
    """Run arms in processes of their own, ``args.jobs`` at a time."""
    shared = [a for a in sys.argv[1:] if not a.startswith("--jobs")]
    if "--jobs" in sys.argv:
        at = sys.argv.index("--jobs")
        shared = sys.argv[1:at] + sys.argv[at + 2 :]
    waiting, running = list(wanted), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            task, arm, seed = waiting.pop(0)
            only = ["--only", f"{task}/{arm}/{seed}", "--quiet"]
            running.append(subprocess.Popen([sys.executable, __file__, *shared, *only]))
        time.sleep(1)
        running = [p for p in running if p.poll() is None]


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the CIFAR-10 files and weights/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--arms", nargs="+", default=["alone", "plain", "dcd"], choices=ARMS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help=f"of the student and of the teacher; usually {USUAL}")
    parser.add_argument(
        "--ratio", type=float, default=1.0, help="steps of the student for each of the teacher, without pairs"
    )
    parser.add_argument("--images", type=int, default=5000, help="training pictures of a domain, at most 5,000")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=10, help="turns of teacher and of student, without pairs")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--student-rate", type=float, default=1.0, help="rate of distilled students, times --lr")
    parser.add_argument("--width", type=int, help=f"of the student; the teacher has {TEACHER}")
    parser.add_argument(
        "--style", type=float, default=8.0, help="published 1e4 is for VGG-16, whose Gram matrices are small"
    )
    parser.add_argument("--feature", type=float, default=8.0)
    parser.add_argument("--weight", type=float, default=8.0, help="of DCD's feature term")
    parser.add_argument("--raw", type=float, default=20.0, help="of plain distillation's feature term")
    parser.add_argument("--inputs", default="grey", choices=["edges", "grey"], help="what pairs are made of")
    parser.add_argument("--gan", type=float, default=1.0, help="weight of the student's adversarial term")
    parser.add_argument(
        "--kind", default="lsgan", choices=["hinge", "lsgan", "vanilla"], help="adversarial loss of pairs"
    )
    parser.add_argument("--recon", type=float, default=20.0, help="of the pixel error of pairs, in every network")
    parser.add_argument("--cycle", type=float, default=10.0, help="of the cycles, without pairs")
    parser.add_argument("--identity", type=float, default=0.5, help="of the identity terms, relative to the cycles'")
    parser.add_argument("--network", help="generator")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", help="task/arm/seed")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [(t, a, s) for s in range(args.seeds) for t in args.tasks for a in args.arms]
    if args.speed:
        print(speed(args))
        return
    if args.only:
        task, arm, seed = args.only.split("/")
        one(args, task, arm, int(seed))
        return
    if not args.table and args.jobs > 1:
        together(args, wanted)
    elif not args.table:
        for task, arm, seed in wanted:
            one(args, task, arm, seed)
    print(table(args))


if __name__ == "__main__":
    main()
