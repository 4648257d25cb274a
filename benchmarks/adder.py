"""Adder convolutions beside oneDNN's convolutions and pairwise distances, and the machine's limit.

    python benchmarks/adder.py --threads 1 --out benchmarks/adder.json   # about 1 min
    python benchmarks/adder.py --threads 2 --out benchmarks/adder_2threads.json
    python benchmarks/adder.py --cuda --out benchmarks/adder_cuda.json     # Triton kernels, where a GPU is
    python benchmarks/adder.py --page                                    # only write the page again

Shapes are those of ResNet-20 (32 x 32 images) and ResNet-18 (224 x 224). Contenders of one shape are timed in turn, in
interleaved rounds; a figure is the median of its rounds. The convolution is torch's (oneDNN, float32), contiguous or
channels-last, whichever is faster; the 8-bit layer takes and returns float32, so that rounding the input is in its
time. ``cdist`` is ``torch.cdist(p=1)`` on the unfolded input, without the unfolding.

Roofline: in float32 a register of differences takes three arithmetic instructions (multiply-add, magnitude, add). A
core with four 256-bit pipes, two that multiply and two that add (Zen 4), or with two 512-bit ports that do all of it,
needs 1.5 cycles for 16 of them; a convolution 1 or 0.5. In bytes 64 differences take two instructions, a cycle at
least. The clock is measured by a chain of dependent additions. ``bytes`` is what input, filters and output hold: at
some 10 bytes a cycle of memory none of these shapes is bound by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.cost.ledger import cost
from gossamer.kernels import cpu, gpu
from gossamer.methods.addernet.layers import convert_to_adder, quantize_adder
from gossamer.methods.addernet.method import measure_grids
from gossamer.models.build import load_model
from gossamer.ops.adder import adder_conv2d
from gossamer.ops.adder_layers import AdderConv2d, Int8AdderConv2d, shared_grid
from gossamer.runtimes import device_key

RESNET20 = [(16, 16, 32, 3, 1), (16, 32, 32, 3, 2), (16, 32, 32, 1, 2), (32, 32, 16, 3, 1), (32, 64, 16, 3, 2),
            (32, 64, 16, 1, 2), (64, 64, 8, 3, 1)]  # fmt: skip
RESNET18 = [(64, 64, 56, 3, 1), (64, 128, 56, 3, 2), (64, 128, 56, 1, 2), (128, 128, 28, 3, 1), (128, 256, 28, 3, 2),
            (128, 256, 28, 1, 2), (256, 256, 14, 3, 1), (256, 512, 14, 3, 2), (256, 512, 14, 1, 2),
            (512, 512, 7, 3, 1)]  # fmt: skip
SETS = {"ResNet-20, batch 16": (16, RESNET20), "ResNet-18, batch 1": (1, RESNET18)}
LIMITS = {"fp32": (1.5, 64), "int8": (1.0, 64)}
"""Cycles for one 512-bit register of differences, and its bytes."""
ROUND_S = 0.02
clock: Callable[[], float] = time.perf_counter


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return seconds of one call."""
    started = clock()
    for _ in range(repeats):
        call()
    return (clock() - started) / repeats


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of every call, in interleaved rounds of about ``ROUND_S`` each."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(ROUND_S / max(timed(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, repeats[name]))
    return {name: statistics.median(t) for name, t in times.items()}


@torch.no_grad()
def shape_row(batch: int, sizes: tuple[int, int, int, int, int], rounds: int, hertz: float, threads: int) -> dict:
    """Time one shape in all ways."""
    channels, filters, side, kernel, stride = sizes
    padding = kernel // 2
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=draw).relu()
    layer = AdderConv2d(channels, filters, kernel, stride, padding).eval()
    eight = Int8AdderConv2d.of(layer, shared_grid(x, layer.weight))
    weight, last = layer.weight.detach(), x.to(memory_format=torch.channels_last)
    columns = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2).contiguous()
    found = medians({
        "conv": lambda: F.conv2d(x, weight, stride=stride, padding=padding),
        "conv last": lambda: F.conv2d(last, weight, stride=stride, padding=padding),
        "fp32": lambda: adder_conv2d(x, weight, stride, padding),
        "int8": lambda: eight(x),
        "cdist": lambda: torch.cdist(columns, weight.flatten(1), p=1),
    }, rounds)  # fmt: skip
    conv = min(found["conv"], found.pop("conv last"))
    out = layer(x)
    pairs = out.numel() * weight[0].numel()
    row: dict[str, Any] = {"shape": f"{channels}->{filters} {kernel}x{kernel}/{stride} at {side}"}
    row |= {"Mpairs": round(pairs / 1e6, 1)}
    row |= {"conv ms": conv * 1e3, "adder ms": found["fp32"] * 1e3, "int8 ms": found["int8"] * 1e3}
    row |= {"cdist ms": found["cdist"] * 1e3}
    row |= {"adder / conv speed": conv / found["fp32"], "int8 / conv speed": conv / found["int8"]}
    row |= {"adder / cdist speed": found["cdist"] / found["fp32"]}
    for name, width in (("fp32", 16), ("int8", 64)):
        cycles = found[name] * hertz * threads / (pairs / width)
        row |= {f"{name} cycles a register": cycles, f"{name} of the limit": LIMITS[name][0] / cycles}
    held = 4 * (x.numel() + weight.numel() + out.numel())
    row |= {"bytes a cycle": held / (found["fp32"] * hertz)}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


@torch.no_grad()
def gradient_row(batch: int, sizes: tuple[int, int, int, int, int], rounds: int) -> dict:
    """Time the gradients of one shape beside those of a convolution."""
    channels, filters, side, kernel, stride = sizes
    padding = kernel // 2
    x = torch.randn(batch, channels, side, side)
    weight = torch.randn(filters, channels, kernel, kernel)
    grad = torch.randn_like(adder_conv2d(x, weight, stride, padding))
    ops, at = torch.ops.gossamer, ([stride, stride], [padding, padding])
    of = {"stride": stride, "padding": padding}
    found = medians({
        "conv input": lambda: torch.nn.grad.conv2d_input(list(x.shape), weight, grad, **of),
        "input": lambda: ops.adder_conv2d_input_grad(grad, x, weight, *at, "clamp", 1.0),
        "conv filters": lambda: torch.nn.grad.conv2d_weight(x, list(weight.shape), grad, **of),
        "filters, full": lambda: ops.adder_conv2d_weight_grad(grad, x, weight, *at, "difference", 1.0),
        "filters, sign": lambda: ops.adder_conv2d_weight_grad(grad, x, weight, *at, "sign", 1.0),
    }, rounds)  # fmt: skip
    return {"shape": f"{channels}->{filters} {kernel}x{kernel}/{stride} at {side}"} | {
        f"{name} ms": round(1e3 * t, 3) for name, t in found.items()
    }


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cuda_row(batch: int, sizes: tuple[int, int, int, int, int], rounds: int) -> dict:
    """Time one shape on a GPU: forward pass and gradients beside a float32 convolution (no tensor cores) and cdist."""
    channels, filters, side, kernel, stride = sizes
    at, of = ([stride] * 2, [kernel // 2] * 2), {"stride": stride, "padding": kernel // 2}
    x = torch.randn(batch, channels, side, side, device="cuda")
    weight = torch.randn(filters, channels, kernel, kernel, device="cuda")
    grad = torch.randn_like(F.conv2d(x, weight, **of))
    columns = F.unfold(x, kernel, **of).transpose(1, 2).contiguous()
    ops, rules = torch.ops.gossamer, (1.0, "clamp", "difference")
    found = medians({
        "conv": lambda: F.conv2d(x, weight, **of),
        "adder": lambda: ops.adder_conv2d(x, weight, *at, *rules),
        "cdist": lambda: torch.cdist(columns, weight.flatten(1), p=1),
        "conv input": lambda: torch.nn.grad.conv2d_input(list(x.shape), weight, grad, **of),
        "input": lambda: ops.adder_conv2d_input_grad(grad, x, weight, *at, "clamp", 1.0),
        "filters, full": lambda: ops.adder_conv2d_weight_grad(grad, x, weight, *at, "difference", 1.0),
        "filters, sign": lambda: ops.adder_conv2d_weight_grad(grad, x, weight, *at, "sign", 1.0),
    }, rounds)  # fmt: skip
    row = {"shape": f"{channels}->{filters} {kernel}x{kernel}/{stride} at {side}", "batch": batch}
    row |= {f"{name} ms": round(1e3 * seconds, 3) for name, seconds in found.items()}
    row |= {"adder / conv speed": round(found["conv"] / found["adder"], 3)}
    pairs = grad.numel() * weight[0].numel()
    row |= {"adder / cdist speed": round(found["cdist"] / found["adder"], 2)}
    return row | {"Gpairs/s": round(pairs / found["adder"] / 1e9)}


def measure_cuda(options: argparse.Namespace) -> dict[str, Any]:
    """Return the table of a GPU."""
    global clock
    clock = _synchronised
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "threads": 0, "GHz": 0}
    found |= {"kernels": f"Triton {gpu.describe()}", "clock": "wall, synchronised"}
    found["ResNet-20, batch 256"] = [cuda_row(256, s, options.rounds) for s in RESNET20]
    found["ResNet-18, batch 32"] = [cuda_row(32, s, options.rounds) for s in RESNET18]
    return found


@torch.no_grad()
def network_rows(name: str, batch: int, side: int, rounds: int) -> list[dict]:
    """Time a whole network in torch: products, differences, bytes."""
    torch.manual_seed(0)
    dense = load_model(name, num_classes=10).eval()
    adder = convert_to_adder(load_model(name, num_classes=10)).eval()
    images = torch.randn(batch, 3, side, side)
    eight = convert_to_adder(load_model(name, num_classes=10)).eval()
    eight = quantize_adder(eight, measure_grids(eight, images))
    models: dict[str, nn.Module] = {"products": dense, "differences": adder, "differences, bytes": eight}
    times = medians({k: lambda m=m: m(images) for k, m in models.items()}, rounds)
    rows = []
    for kind, model in models.items():
        found = cost(model, images[:1], saved=False)
        row = {"network": name, "batch": batch, "layers": kind, "ms": round(1e3 * times[kind], 2)}
        row |= {"speed": round(times["products"] / times[kind], 2), "multiplications": found.macs}
        rows.append(row | {"additions": found.additions, "energy uJ": round(found.energy_pj * 1e-6, 1)})
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all tables."""
    global clock
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_num_threads(options.threads)
    hertz = cpu.clock_hz()
    found: dict[str, Any] = {"device": device_key(), "threads": options.threads, "GHz": round(hertz / 1e9, 2)}
    found |= {"kernels": cpu.describe(), "clock": "processor time, beside other load" if options.busy else "wall"}
    for name, (batch, shapes) in SETS.items():
        found[name] = [shape_row(batch, s, options.rounds, hertz, options.threads) for s in shapes]
    found["gradients, batch 16"] = [gradient_row(16, s, options.rounds) for s in RESNET20]
    found["networks"] = network_rows("resnet20_cifar", 16, 32, options.rounds)
    found["networks"] += network_rows("resnet18", 1, 224, options.rounds)
    return found


def page(found: dict[str, Any]) -> str:
    """Return the tables as a page."""
    kind = "a GPU" if "GHz" in found and not found["GHz"] else "a CPU"
    lines = [f"# Adder convolutions on {kind}", "", "Shapes" + str(__doc__).partition("\nShapes")[2].rstrip(), ""]
    lines += [f"{found['device']}, {found['threads']} thread(s), {found['GHz']} GHz, kernels: {found['kernels']}, "]
    lines[-1] += f"times: {found['clock']}."
    lines.append("")
    for title, rows in found.items():
        if isinstance(rows, list):
            lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
            lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows] + [""]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page, or only write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--busy", action="store_true", help="processor time: one thread on a machine with other load")
    parser.add_argument("--cuda", action="store_true", help="the Triton kernels")
    parser.add_argument("--page", action="store_true", help="only write the page of the results in --out")
    options = parser.parse_args()
    if not options.page:
        found = measure_cuda(options) if options.cuda else measure(options)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    text = page(json.loads(options.out.read_text()))
    options.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
