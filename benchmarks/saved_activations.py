"""Training with packed activations beside plain training: saved bytes, step time, and peak memory on CUDA.

    python benchmarks/saved_activations.py --model vit --batch 64            # a CPU
    python benchmarks/saved_activations.py --model deit_small_patch16_224 --batch 128   # where a GPU is: peak memory

    python benchmarks/saved_activations.py --peak-rss                        # a CPU: peak memory of the process

Variants run interleaved in one process: plain with fused attention, plain with unfused attention, Mesa. Times are
medians of wall-clock and of processor time; the latter hardly minds other processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer as gs
from gossamer.cost.saved import saved_tensors
from gossamer.kernels import report

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
"""The ViT of the room's experiment."""
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def variants(name: str) -> dict[str, nn.Module]:
    """Return the same model plain and packed."""
    torch.manual_seed(0)
    fused = timm.create_model("vit_tiny_patch16_224", **SMALL) if name == "vit" else timm.create_model(name)
    unfused = copy.deepcopy(fused)
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    packed, linear = (
        gs.Stack([method]).enter(copy.deepcopy(fused), gs.Phase("fit", 1))
        for method in (gs.Mesa(), gs.Mesa(kinds=("linear", "gelu", "layernorm")))
    )
    return {"fused attention": fused, "unfused attention": unfused, "mesa": packed, "mesa, fused attention": linear}


def step(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype | None) -> None:
    """Take one training step without an update."""
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(x).float(), target)
    loss.backward()
    model.zero_grad(set_to_none=True)


def timed(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype | None) -> tuple[float, float]:
    """Return wall-clock and processor milliseconds of a step."""
    if x.is_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step(model, x, target, dtype)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def peak(model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype | None) -> float:
    """Return the peak of allocated CUDA memory of a step in MiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(model, x, target, dtype)
    return torch.cuda.max_memory_allocated() / 2**20


def resident(name: str, precision: str, batch: int) -> float:
    """Return by how many MiB one step raises the peak of this process's memory (Linux)."""
    model = variants("vit")[name].train()
    x, target = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    step(model, x[:2], target[:2], DTYPES[precision])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(model, x, target, DTYPES[precision])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def all_resident(batch: int) -> dict[str, dict[str, float]]:
    """Return ``resident`` of every variant, each in a process of its own.

    glibc keeps freed blocks of up to 32 MiB on a heap that fragments; with a fixed mmap threshold the process
    gives back what it frees, and its size says what the step needs.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, dict[str, float]] = {}
    for precision in DTYPES:
        found[precision] = {}
        for name in ("fused attention", "unfused attention", "mesa"):
            command = [sys.executable, __file__, "--one", name, "--precision", precision, "--batch", str(batch)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[precision][name] = round(float(done.stdout.split()[-1]), 1)
    return found


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit", help="'vit' (small, 32 x 32 images) or a timm name")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-rss", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(resident(args.one, args.precision, args.batch))
        return
    if args.peak_rss:
        print(json.dumps({"batch": args.batch, "peak_rss_growth_mib": all_resident(args.batch)}, indent=1))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, object] = {"model": args.model, "batch": args.batch, "device": device, "kernels": report()}
    for precision, dtype in DTYPES.items():
        models = variants(args.model)
        side = SMALL["img_size"] if args.model == "vit" else models["fused attention"].pretrained_cfg["input_size"][1]
        x = torch.randn(args.batch, 3, side, side)
        target = torch.randint(0, 10, (args.batch,)).to(device)
        rows = {n: {"wall": [], "cpu": []} for n in models}
        facts: dict[str, dict[str, float]] = {n: {} for n in models}
        for name, model in models.items():  # bytes are linear in the batch: two images tell
            kept = saved_tensors(model, (torch.randn(2, 3, side, side),), dtype)
            each = sum(s.bytes for s in kept if not s.weight_copy) / 2
            facts[name]["saved_mib"] = round(each * args.batch / 2**20, 2)
        x = x.to(device)
        for name, model in models.items():
            models[name] = model.to(device).train()
            if device == "cuda":
                step(models[name], x, target, dtype)
                facts[name]["peak_mib"] = round(peak(models[name], x, target, dtype), 1)
        for _ in range(args.rounds):
            for name, model in models.items():
                wall, cpu = timed(model, x, target, dtype)
                rows[name]["wall"].append(wall)
                rows[name]["cpu"].append(cpu)
        for name, row in rows.items():
            facts[name] |= {f"{k}_ms": round(statistics.median(v), 2) for k, v in row.items()}
            for base in ("unfused attention", "fused attention"):
                pairs = [a / b for a, b in zip(row["cpu"], rows[base]["cpu"], strict=True)]
                facts[name][f"cpu_time_over_{base.split()[0]}"] = round(statistics.median(pairs), 3)
        found[precision] = facts
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
