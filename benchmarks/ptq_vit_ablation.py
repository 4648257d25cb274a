"""What each part of PTQ for ViT brings, on the embedded ImageNet ViT-Ti/16 and photographs.

    python benchmarks/ptq_vit_ablation.py [--bits 6] [--images 200] [--rows "max;all"] [--json FILE]

Every row is compared with the float model image by image: agreement of the first choice, mean KL of the
outputs, signal to noise of the logits, exact McNemar test of accuracy, and the pair order (Kendall's tau) of
attention scores. Calibration images are the embedded calibration split; evaluation images are never among them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.core.method import Method
from gossamer.data.loading import batches
from gossamer.data.sources import open_data
from gossamer.data.transforms import eval_transform
from gossamer.kits.calibration import calibrate
from gossamer.models.build import load_model
from gossamer.models.preprocessing import preprocessing
from gossamer.tasks.paired import compare

FAST: dict[str, Any] = {"n_candidates": 40, "coarse": True, "images": 32, "search_images": 8}


def variants(bits: int) -> dict[str, Method]:
    """Return the rows of the table."""
    width: dict[str, Any] = {"w_bits": bits, "a_bits": bits}
    searched = {**width, **FAST}
    bare = {**searched, "rank_gamma": 0.0, "bias_correction": False}
    ours = {"per_channel": True, "unsigned_softmax": True, "equalise": 0.8}
    candidates = tuple(range(bits - 2, bits + 3))
    return {
        "max": gs.PTQMinMax(**width),
        "percentile": gs.PTQMinMax(**width, percentile=99.9),
        "similarity": gs.PTQViT(**bare),
        "similarity+ranking": gs.PTQViT(**{**bare, "rank_gamma": 0.1}),
        "similarity+bias": gs.PTQViT(**{**bare, "bias_correction": True}),
        "all": gs.PTQViT(**searched),
        "all, gamma 1": gs.PTQViT(**searched, rank_gamma=1.0),
        "all, mixed": gs.PTQViT(**searched, mixed={"bits": candidates, "budget": f"{bits}bit"}),
        "extensions, no search": gs.PTQViT(**{**searched, "max_iter": 0}, **ours),
        "all + extensions": gs.PTQViT(**searched, **ours),
    }


def images(spec: str, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` images [N, 3, H, W] and labels of a data spec."""
    source = open_data(spec)
    parts = list(batches(source, eval_transform(preprocessing(model)), 16))
    return torch.cat([b["image"] for b in parts])[:count], torch.cat([b["target"] for b in parts])[:count]


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs [N, K]."""
    return torch.cat([model(part) for part in x.split(25)])


def row(
    name: str, method: Method, model: nn.Module, data: tuple[Tensor, Tensor, Tensor], plain: Tensor
) -> dict[str, Any]:
    """Calibrate one variant and compare it with the float model."""
    calibration, evaluation, targets = data
    started = time.perf_counter()
    done = calibrate(method, copy.deepcopy(model), calibration)
    seconds = time.perf_counter() - started
    got = logits(done, evaluation)
    pair = compare(plain, got, targets)
    facts = method.describe(done)["facts"]
    noise = float((got - plain).square().sum())
    return {
        "variant": name,
        "top1": round(100 * float((got.argmax(1) == targets).float().mean()), 2),
        **{k: v for k, v in pair.to_json().items() if isinstance(v, int | float)},
        "snr_db": round(10 * math.log10(float(plain.square().sum()) / noise), 2),
        "tau": facts.get("mean pair order tau of scores"),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Print one line of JSON per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--images", type=int, default=200, help="evaluation images")
    parser.add_argument("--rows", default="", help="variants separated by semicolons; default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_model("vit_tiny_patch16_224@embedded").eval()
    calibration, _ = images("embedded:calibration", model, 32)
    evaluation, targets = images("embedded:eval", model, given.images)
    plain = logits(model, evaluation)
    print(json.dumps({"variant": "float", "top1": round(100 * float((plain.argmax(1) == targets).float().mean()), 2)}))
    table = []
    wanted = [name for name in given.rows.split(";") if name]
    for name, method in variants(given.bits).items():
        if wanted and name not in wanted:
            continue
        table.append(row(name, method, model, (calibration, evaluation, targets), plain))
        print(json.dumps(table[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
