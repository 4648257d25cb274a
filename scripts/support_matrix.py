"""Which timm models each method handles: applied at zero compression, does the model stay the same?

Writes ``docs/support_matrix.md`` and ``docs/support_matrix.json``. For every model below and every method
that changes tokens or precision, the model is built small with random weights (layer scales, biases and
position terms far from their trivial initial values, else a method that forgets them would pass), the
method is applied without compressing anything, and the logits are compared with the plain model's:

* methods that change tokens run with a budget of 100 % of the MACs, through all their phases, untrained,
  and once more with 75 %, where the model must work, with fewer tokens and other logits;
* methods that change precision are stopped where every layer is opened and wrapped, before quantization
  (those that train at low widths are wrapped at 32 bits, their neutral setting).

A model that a method cannot handle must be refused with a reason; a difference is a fault.
Run: ``python scripts/support_matrix.py`` (a few minutes on a CPU; no network).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from gossamer.core import registry
from gossamer.core.errors import GossamerError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Plan
from gossamer.core.stack import Stack
from gossamer.ops.tokens import find_track

VIT14 = {"img_size": 56, "depth": 3}
VIT16 = {"img_size": 64, "depth": 3}
VIT32 = {"img_size": 96, "depth": 3}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ViT": (VIT16, ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_small_patch16_384"]),
    "ViT, other patches": (VIT32, ["vit_small_patch32_224", "vit_small_patch8_224", "vit_base_patch32_plus_256"]),
    "ViT, large": (VIT16, ["vit_large_patch16_224"]),
    "ViT, GAP": (VIT16, ["vit_base_patch16_gap_224", "vit_medium_patch16_gap_256"]),
    "ViT, registers": (VIT16, [
        "vit_little_patch16_reg4_gap_256", "vit_medium_patch16_reg4_gap_256", "vit_mediumd_patch16_reg4_gap_256",
        "vit_wee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256"]),
    "ViT, other training": (VIT16, ["vit_base_patch16_224_miil", "flexivit_small"]),
    "ViT, post-norm blocks": (VIT16, ["vit_base_patch16_rpn_224"]),
    "ViT, relative positions": (VIT16, ["vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"]),
    "ViT, rotary positions": (VIT16, ["vit_small_patch16_rope_224", "vit_small_patch16_dinov3"]),
    "ViT, parallel blocks": (VIT16, ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"]),
    "ViT, hybrid stem": ({"img_size": 128, "depth": 3}, ["vit_tiny_r_s16_p8_224"]),
    "DeiT": (VIT16, ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]),
    "DeiT, distilled": (VIT16, ["deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"]),
    "DeiT-3": (VIT16, ["deit3_small_patch16_224", "deit3_medium_patch16_224", "deit3_base_patch16_224"]),
    "DINOv2": (VIT14, ["vit_small_patch14_dinov2", "vit_base_patch14_dinov2"]),
    "DINOv2, registers": (VIT14, ["vit_small_patch14_reg4_dinov2"]),
    "CLIP": (VIT16, ["vit_base_patch16_clip_224", "vit_xsmall_patch16_clip_224"]),
    "SigLIP": (VIT16, ["vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"]),
    "NaFlex": ({"depth": 2}, ["naflexvit_base_patch16_gap"]),
    "SAM": (VIT16, ["samvit_base_patch16_224"]),
    "BEiT": (VIT16, ["beit_base_patch16_224", "beitv2_base_patch16_224"]),
    "EVA": (VIT14, ["eva02_tiny_patch14_224", "eva02_small_patch14_224"]),
    "AIMv2": (VIT14, ["aimv2_large_patch14_224"]),
    "Swin": ({}, ["swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_s3_tiny_224"]),
    "Swin V2": ({}, ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]),
    "CaiT": ({"depth": 2}, ["cait_xxs24_224"]),
    "CrossViT": ({}, ["crossvit_9_240"]),
    "PiT": ({}, ["pit_ti_224", "pit_ti_distilled_224"]),
    "MViTv2": ({}, ["mvitv2_tiny"]),
    "XCiT": ({"depth": 2}, ["xcit_nano_12_p16_224"]),
    "LeViT": ({}, ["levit_128s"]),
    "ConViT": ({"depth": 4}, ["convit_tiny"]),
    "CoaT": ({}, ["coat_lite_tiny"]),
    "Twins": ({}, ["twins_svt_small"]),
    "TNT": ({"depth": 2}, ["tnt_s_legacy_patch16_224"]),
    "NesT": ({}, ["nest_tiny"]),
    "VOLO": ({}, ["volo_d1_224"]),
    "PVTv2": ({}, ["pvt_v2_b0"]),
    "MaxViT": ({}, ["maxvit_nano_rw_256"]),
    "Hiera": ({}, ["hiera_tiny_224"]),
    "Visformer": ({}, ["visformer_tiny"]),
    "MobileViT": ({}, ["mobilevit_xxs"]),
    "EfficientFormer": ({}, ["efficientformer_l1"]),
    "FastViT": ({}, ["fastvit_t8"]),
    "Mixer": ({"img_size": 64}, ["mixer_s16_224"]),
    "ConvNeXt": ({}, ["convnext_atto", "convnextv2_atto"]),
    "ResNet": ({}, ["resnet18", "resnet50"]),
    "EfficientNet": ({}, ["efficientnet_b0", "tf_efficientnet_lite0"]),
    "MobileNet": ({}, ["mobilenetv3_small_100", "mobilenetv4_conv_small"]),
    "RegNet": ({}, ["regnety_002"]),
    "VGG": ({}, ["vgg11"]),
}  # fmt: skip
TOLERANCE = 2e-5
"""Largest difference of logits, relative to the largest logit, that counts as the same. It is float32's rounding:
folding the batch norms of Visformer gives 1.1e-5 (in float64 5e-14), everything else stays below 1e-6."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One model under one method.

    Attributes:
        verdict: ``same``, ``different``, ``refused`` (with the reason), or ``broken``: the same at zero
            compression, but not working, or not smaller, at a real one.
        error: Largest difference of logits at zero compression, relative to the largest logit.
        reduced: The same at 75 % of the MACs, for methods that have such a budget.
        reason: Why the method refused, or what is broken.
    """

    verdict: str
    error: float | None = None
    reduced: float | None = None
    reason: str = ""


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic of ``model`` a value that no method could leave out unnoticed."""
    draw = torch.Generator().manual_seed(seed)

    def normal(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=draw)

    matrices = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in matrices:
                p.copy_(normal(p) / (p.numel() / p.shape[0]) ** 0.5)
            elif name.rpartition(".")[2] == "bias" or p.ndim != 1:  # biases, tokens, positions, bias tables
                p.add_(0.3 * normal(p))
            else:  # scales: norms, layer scales
                p.copy_(0.8 + 0.3 * normal(p).tanh())
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * normal(b))
            elif name.endswith("running_var"):
                b.copy_(1.0 + 0.5 * normal(b).tanh())
    return model.eval()


def build(name: str, options: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """Return a small plain model in evaluation mode and two input images."""
    torch.manual_seed(0)
    model = unsettle(timm.create_model(name, num_classes=16, **options))
    size = options.get("img_size") or model.default_cfg["input_size"][-1]
    size = size if isinstance(size, int) else size[0]
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _idle(phase: Phase) -> Phase:
    return dataclasses.replace(phase, steps=0)


def uncompressed(method: Method, model: nn.Module) -> nn.Module:
    """Return ``model`` with ``method`` applied as far as it goes without compressing anything."""
    stack = Stack([method])
    model = stack.prepare(model)
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, _idle(phase))
        if "precision" in method.touches and phase.work is not None:
            return model  # opened and wrapped; what follows would quantize
        model = stack.leave(model, _idle(phase))
    return stack.finish(model)


def with_budget(name: str, share: str) -> Method:
    """Return a method with a budget of MACs; where it has no such option in its neutral setting, else with defaults."""
    fields = {f.name for f in dataclasses.fields(registry.find(name))}  # type: ignore[arg-type]
    if "macs" in fields:
        return registry.build(name, {"macs": share})
    neutral = import_module(f"{registry.methods()[name].package}.example").example().neutral
    return registry.build(name, {}) if neutral is None else neutral()


def _distance(model: nn.Module, expected: torch.Tensor, x: torch.Tensor) -> float:
    with torch.inference_mode():
        return ((model.eval()(x) - expected).abs().max() / expected.abs().max()).item()


def judge(make: Callable[[str], Method], model: nn.Module, x: torch.Tensor) -> Result:
    """Return what a method does to a model.

    Args:
        make: Share of MACs to method.
        model: Plain model in evaluation mode; left as it is.
        x: Images [B, 3, H, W].
    """
    with torch.inference_mode():
        expected = model(x)
    try:
        error = _distance(uncompressed(make("100%"), copy.deepcopy(model)), expected, x)
    except GossamerError as err:
        return Result("refused", reason=str(err))
    if error > TOLERANCE:
        return Result("different", error)
    if "tokens" not in make("75%").touches:
        return Result("same", error)
    smaller = uncompressed(make("75%"), copy.deepcopy(model))
    reduced, track = _distance(smaller, expected, x), find_track(smaller)
    if track is None or not reduced < float("inf") or reduced <= TOLERANCE:
        return Result("broken", error, reduced, "at 75 % of the MACs the logits are not finite, or do not change")
    return Result("same", error, reduced)


def rooms() -> list[str]:
    """Return the methods whose change of a model can be checked this way."""
    found = [m for m in registry.methods().values() if "classification" in m.tasks]
    return [m.name for m in found if {"tokens", "precision"} & set(m.touches)]


def matrix(names: Iterable[str] | None = None, methods: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return one row per model: ``{model, family, results: {method: {verdict, error, reason}}}``."""
    chosen = set(names) if names is not None else None
    rows = []
    for family, (options, members) in MODELS.items():
        for name in members:
            if chosen is not None and name not in chosen:
                continue
            model, x = build(name, options)
            with torch.inference_mode():
                if not torch.isfinite(model(x)).all():
                    raise RuntimeError(f"{name}: the plain model's logits are not finite; the comparison says nothing")
            results = {m: dataclasses.asdict(judge(partial(with_budget, m), model, x)) for m in methods or rooms()}
            rows.append({"model": name, "family": family, "options": options, "results": results})
            said = ", ".join(f"{m} {r['verdict']}" for m, r in results.items())
            print(f"{name:40s} {said}", file=sys.stderr)
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the matrix as a page; reasons of refusal are numbered below the table."""
    methods = list(rows[0]["results"])
    reasons: dict[str, int] = {}

    def cell(result: dict[str, Any]) -> str:
        if result["verdict"] == "refused":
            return f"refused [{reasons.setdefault(result['reason'], len(reasons) + 1)}]"
        return f"{'yes' if result['verdict'] == 'same' else '**' + result['verdict'] + '**'}, {result['error']:.0e}"

    body = [
        f"| `{r['model']}` | {r['family']} | " + " | ".join(cell(r["results"][m]) for m in methods) + " |" for r in rows
    ]
    counts = []
    for m in methods:
        verdicts = [r["results"][m]["verdict"] for r in rows]
        counts.append(f"{m}: {verdicts.count('same')} supported, {verdicts.count('refused')} refused")
    lines = [
        "# Support matrix",
        "",
        f"{len(rows)} timm models (timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}).",
        '"yes" means that the method was applied at zero compression and the logits stayed those of the plain model;',
        f"the figure is the largest difference relative to the largest logit (at most {TOLERANCE:g}, float32).",
        "Weights are random, with layer scales, biases and position terms far from their initial values.",
        "Token reduction was applied a second time, at 75 % of the MACs: the model still works, on fewer tokens.",
        '"refused" means that the method said no, with the reason below. Written by `scripts/support_matrix.py`.',
        "",
        "; ".join(counts) + ".",
        "",
        "| model | family | " + " | ".join(methods) + " |",
        "| --- | --- |" + " --- |" * len(methods),
        *body,
        "",
        "## Reasons",
        "",
        *(f"{k}. {reason}" for reason, k in reasons.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Write the two files; returns 1 if a method changed a model it should have kept or refused."""
    parser = argparse.ArgumentParser(description="Write the support matrix.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    parser.add_argument("--only", nargs="*", help="these models only")
    args = parser.parse_args()
    rows = matrix(args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "support_matrix.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.out / "support_matrix.md").write_text(as_markdown(rows), encoding="utf-8")
    wrong = [(r["model"], m) for r in rows for m, v in r["results"].items() if v["verdict"] in ("different", "broken")]
    for model, method in wrong:
        print(f"FAULT: {method} on {model}: see the matrix", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
