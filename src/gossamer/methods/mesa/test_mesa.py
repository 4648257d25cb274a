"""Mesa against the release's recorded numbers (``oracle.json``), the sheet's formulas and its own promises."""

from __future__ import annotations

import copy
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, ModelError, RecipeError
from gossamer.core.schedule import Phase, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.cost.saved import saved_tensors
from gossamer.methods.mesa import Mesa
from gossamer.methods.mesa.layers import is_packed, stores
from gossamer.models.timm_adapter import open_attention
from gossamer.ops.attention import OpenAttention
from gossamer.ops.group_pack import arrange, move_range, no_bounds, pack, unpack
from gossamer.tasks.classification import Classification

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle.json").read_text())
FIGURES = {f["name"]: f for f in tomllib.loads((HERE / "figures.toml").read_text())["figure"]}
FIT = Phase("fit", 1)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}


def wave(shape: tuple[int, ...], seed: float) -> Tensor:
    """Return fixed pseudo-random numbers in [-1, 1] that need no generator."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    v = torch.sin(i * 12.9898 + seed * 78.233) * 43758.5453
    return ((v - v.floor()) * 2 - 1).float().reshape(shape)


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**VIT, **options})
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # packed attention is the unfused one: equal bits need the same form
    return model


def trained_looking(model: nn.Module) -> nn.Module:
    """Give the class token the size of the others: at 1e-6 its LayerNorm would magnify any rounding a thousandfold."""
    nn.init.normal_(model.cls_token)
    return model


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=5,
        drop_path_rate=0.0,
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5)


def packing(model: nn.Module, **options: Any) -> nn.Module:
    """Return the model as a training phase sees it."""
    stack = Stack([Mesa(**options)])
    return stack.enter(stack.prepare(model), FIT)


def dim_of(shape: list[int]) -> int:
    return 1 if len(shape) == 4 else -1


# -- the release -----------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ORACLE["pack"], ids=lambda c: f"{c['shape']}-{c['groups']}")
def test_groups_are_those_of_the_release(case: dict) -> None:
    x = torch.arange(math.prod(case["shape"])).reshape(case["shape"])
    layout, grouped = arrange(x, dim_of(case["shape"]), case["groups"])
    ours = grouped.data.reshape(layout.rows, layout.groups, layout.inner).transpose(0, 1).flatten(1)
    theirs = torch.tensor(case["result"])
    assert torch.equal(ours.sort(1).values, theirs.sort(1).values)
    if len(case["shape"]) != 4 or case["groups"] == case["shape"][1]:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ORACLE["ranges"], ids=lambda c: str(c["shape"]))
def test_running_ranges_are_those_of_the_release(case: dict) -> None:
    bounds = no_bounds(case["groups"])
    for k, after in enumerate(case["after"]):
        x = wave(tuple(case["shape"]), 20 + k) * (1 + 0.3 * k)
        move_range(arrange(x, dim_of(case["shape"]), case["groups"])[1], bounds, 1 - 0.9)
        torch.testing.assert_close(bounds, torch.tensor(after), atol=FIGURES["range_oracle"]["tolerance"], rtol=0)


def test_codes_are_those_of_the_kernel_formula() -> None:
    case = ORACLE["kernel"]
    x, bounds = wave(tuple(case["shape"]), 31), no_bounds(case["groups"])
    layout, grouped = arrange(x, -1, case["groups"])
    move_range(grouped, bounds, 0.1)
    codes, grid = pack(grouped, bounds, 255, None)
    ours = codes.view(layout.rows, layout.groups, layout.inner).transpose(0, 1).flatten(1)
    assert ours.int().tolist() == case["codes"]
    back = unpack(layout.grouped(codes), grid, torch.float32)
    values = back.view(layout.rows, layout.groups, layout.inner).transpose(0, 1).flatten()
    torch.testing.assert_close(values, torch.tensor(case["values"]), atol=1e-6, rtol=0)


def test_too_large_values_clip_where_the_release_wraps() -> None:
    x, bounds = wave((100, 100), 32) * 1.3, torch.tensor([[2.0], [-1.0]])
    layout, grouped = arrange(x, -1, 1)
    codes, grid = pack(grouped, bounds, 255, None)
    error = (layout.restore(unpack(layout.grouped(codes), grid, torch.float32)) - x)[x > -1].abs().max()
    assert ORACLE["wrap"]["wrapped"] > 1000 and ORACLE["wrap"]["max_error"] > 2
    assert error < 0.31


# -- exact forward ---------------------------------------------------------------------------------
MODELS = {
    "vit": vit,
    "layer scale": lambda: trained_looking(vit("deit3_small_patch16_224", init_values=0.1)),
    "dropout": lambda: vit(drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3),
    "swin": swin,
    "resnet": resnet,
    "mobilenet": lambda: timm.create_model("mobilenetv2_035", num_classes=5),
}


def image(model: nn.Module, batch: int = 4) -> Tensor:
    size = 56 if hasattr(model, "layers") else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def train_pass(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)
    model.train().zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(image(model))
    (out.float() * wave(tuple(out.shape), 3)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_forward_is_exact_and_gradients_are_close(name: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]()
    packed = packing(copy.deepcopy(plain))
    (expected, exact), (out, grads) = train_pass(plain, dtype), train_pass(packed, dtype)
    assert torch.equal(out, expected)  # dropout and drop-path drew the same: the rounding has numbers of its own
    assert grads.keys() == exact.keys() and plain.state_dict().keys() == packed.state_dict().keys()
    error = math.sqrt(sum(float((grads[n] - g).square().sum()) for n, g in exact.items()))
    size = math.sqrt(sum(float(g.square().sum()) for g in exact.values()))
    assert 0 < error < 0.1 * size
    for buffers in (plain.named_buffers(), packed.named_buffers()):
        assert all(torch.isfinite(b).all() for _, b in buffers if b.is_floating_point())
    running = {n: b for n, b in plain.named_buffers()}
    assert all(torch.equal(running[n], b) for n, b in packed.named_buffers() if n in running)


def test_kept_exactly_the_gradients_are_the_plain_ones() -> None:
    plain = vit()
    packed = packing(copy.deepcopy(plain), bits=32)
    for (name, a), b in zip(train_pass(plain)[1].items(), train_pass(packed)[1].values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_evaluation_touches_no_state() -> None:
    method = Mesa()
    stack = Stack([method])
    model = stack.enter(stack.prepare(vit()), FIT)
    train_pass(model)
    before = method.state_dict()
    model.eval()(image(model))
    after = method.state_dict()
    assert before["noise"] == after["noise"] and before["ranges"].keys() == after["ranges"].keys()
    for path, state in before["ranges"].items():
        shared = path.endswith("attn.values.store")  # the softmax before it keeps the probabilities for both
        assert state["seen"] == after["ranges"][path]["seen"] == (0 if shared else 1)
        assert torch.equal(state["bounds"], after["ranges"][path]["bounds"])


# -- bytes -----------------------------------------------------------------------------------------
def block_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    inside = set(model.blocks[0].modules())
    found = saved_tensors(model, (torch.randn(2, 3, 32, 32),), dtype)
    return sum(s.bytes for s in found if s.module in inside and not s.weight_copy)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "figure", "stored"), [({}, "", 11), ({"save_softmax_input": True}, "release_", 13)]
)
def test_a_block_keeps_what_the_formula_says(
    options: dict, figure: str, stored: int, dtype: torch.dtype | None
) -> None:
    b, n, c, heads = 2, 17, 24, 3
    model = packing(vit(), **options)
    statistics, grids = 2 * 2 * b * n * 4, stored * 2 * heads * 4
    tokens = FIGURES["block_bytes_per_bnc"]["value"] * b * n * c
    scores = FIGURES[f"{figure}block_bytes_per_bhnn"]["value"] * b * heads * n * n
    assert block_bytes(model, dtype) == tokens + scores + statistics + grids


@pytest.mark.parametrize(("name", "fused"), [("bf16_share", False), ("bf16_fused_share", True)])
def test_share_of_deit_small(name: str, fused: bool) -> None:
    """Bytes are linear in the batch, so that two images tell the share at batch 128 (weights' copies aside)."""
    model = timm.create_model("deit_small_patch16_224", depth=1)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    x = torch.zeros(2, 3, 224, 224)

    def total(m: nn.Module) -> int:
        inside = set(m.blocks[0].modules())
        found = saved_tensors(m, (x,), torch.bfloat16)
        return sum(s.bytes for s in found if s.module in inside and not s.weight_copy)

    plain = total(model)
    share = total(packing(model)) / plain
    assert share == pytest.approx(FIGURES[name]["value"], abs=FIGURES[name]["tolerance"])


def test_counting_a_packed_model_leaves_its_ranges_alone() -> None:
    counted, other = packing(vit(), rounding="nearest"), packing(vit(), rounding="nearest")
    assert cost(counted, image(counted)).saved_by_operator["PackedLinear"] > 0
    for a, b in zip(train_pass(counted)[1].values(), train_pass(other)[1].values(), strict=True):
        assert torch.equal(a, b)


def test_the_report_says_what_packing_saves() -> None:
    method = Mesa()
    stack = Stack([method])
    model = stack.finish(stack.enter(stack.prepare(vit()), FIT))
    saved = method.describe(model)["facts"]["saved_bytes_per_image"]
    assert 0.2 < saved["packed"] / saved["plain"] < 0.4  # the images themselves stay


# -- policy ----------------------------------------------------------------------------------------
def chosen(model: nn.Module, **options: Any) -> dict[str, Any]:
    edit = Mesa(**options).enter(model, FIT)
    assert edit is not None
    return edit


def test_head_wise_groups_follow_the_nearest_attention() -> None:
    packed = chosen(swin())["packed"]
    assert packed["layers.0.blocks.1.mlp.fc2"]["groups"] == 1
    assert packed["layers.1.blocks.0.mlp.act"]["groups"] == 2
    assert packed["layers.1.blocks.0.attn.softmax"] == {"class": "Softmax", "groups": 2, "dim": 1}
    assert packed["head.fc"]["groups"] == 2 and not any("patch_embed" in p for p in packed)
    by_channels = chosen(swin(), grouping={"channels": 32})["packed"]
    assert by_channels["layers.1.blocks.0.mlp.fc1"]["groups"] == 2
    assert by_channels["layers.1.blocks.0.mlp.act"]["groups"] == 8
    assert by_channels["layers.1.blocks.0.attn.values"]["groups"] == 2
    assert {e["groups"] for e in chosen(vit(), grouping=1)["packed"].values()} == {1}


def test_types_and_names_choose_layers() -> None:
    only = chosen(vit(), kinds=("linear",), include=("blocks.*",), exclude=("*.1.*", "*proj"))
    assert sorted(only["packed"]) == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert only["opened"] == []  # nothing inside attention packs: it may stay fused
    everything = chosen(vit(), exclude=())["packed"]
    assert {e["class"] for e in everything.values()} == {"Conv2d", "Linear", "LayerNorm", "GELU", "MatMul", "Softmax"}
    assert {e["class"] for e in chosen(resnet())["packed"].values()} == {"Conv2d", "BatchNorm2d", "ReLU", "Linear"}


def test_layers_that_cannot_pack_are_named_and_left_exact() -> None:
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=3)
    edit = chosen(eva)
    assert "blocks.0.attn (EvaAttention)" in edit["exact"] and "blocks.0.mlp.act (SiLU)" in edit["exact"]
    assert "blocks.0.mlp.fc2" in edit["packed"] and not edit["opened"]
    assert any("ls1 (LayerScale)" in e for e in chosen(vit("deit3_small_patch16_224"))["exact"])
    method = Mesa()
    Stack([method]).enter(eva, FIT)
    assert "blocks.0.attn (EvaAttention)" in method.describe(eva)["facts"]["left_exact"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16}, "allowed are 2..8, or 32"),
        ({"ema": 1.0}, r"allowed is \[0, 1\)"),
        ({"kinds": ("linaer",)}, "did you mean 'linear'"),
        ({"grouping": "head"}, "allowed are 'heads'"),
        ({"grouping": 0}, "allowed are 'heads'"),
        ({"rounding": "up"}, "'stochastic' and 'nearest'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Stack([Mesa(**options)]).prepare(vit())


def test_no_effect_is_an_error() -> None:
    with pytest.raises(ModelError, match="no layer of kinds"):
        Stack([Mesa(include=("nowhere.*",))]).prepare(vit())


# -- together with what else happens ---------------------------------------------------------------
def test_a_finished_model_is_the_plain_one() -> None:
    plain = vit()
    stack = Stack([Mesa()])
    model = stack.enter(stack.prepare(copy.deepcopy(plain)), FIT)
    train_pass(model)
    model = stack.finish(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not list(stores(model)) and not any(map(is_packed, model.modules()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_layers_that_come_later_pack_from_the_next_phase_on() -> None:
    method = Mesa()
    stack = Stack([method])
    model = stack.enter(stack.prepare(vit()), FIT)
    train_pass(model)
    before = method.state_dict()["ranges"]
    model = stack.leave(model, FIT)
    assert not any(map(is_packed, model.modules()))
    model.blocks.append(copy.deepcopy(model.blocks[1]))
    model = stack.enter(model, Phase("work", 1, work=lambda *a: None))
    assert not any(map(is_packed, model.modules()))
    model = stack.enter(model, FIT)
    seen = {path: store.seen for path, store in stores(model)}
    assert seen["blocks.1.mlp.fc1.store"] == 1 and seen["blocks.2.mlp.fc1.store"] == 0
    assert all(torch.equal(dict(stores(model))[p].bounds, s["bounds"]) for p, s in before.items())
    train_pass(model)


def test_layers_cut_while_packed_stay_right() -> None:
    model = packing(vit(), grouping=1)
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        for layer, name, dim in ((mlp.fc1, "weight", 0), (mlp.fc1, "bias", 0), (mlp.fc2, "weight", 1)):
            setattr(layer, name, nn.Parameter(getattr(layer, name).narrow(dim, 0, 40).clone()))
    train_pass(model)
    finished = Stack([Mesa()]).finish(model)
    assert type(finished.blocks[0].mlp.fc1) is nn.Linear and len(finished.blocks[0].mlp.fc1.weight) == 40


def test_attention_that_another_method_needs_open_stays_open() -> None:
    stack = Stack([Mesa()])
    model = stack.enter(stack.prepare(vit()), FIT)
    held = open_attention(model, "blocks.0.attn")
    model = stack.leave(model, FIT)
    assert model.blocks[0].attn is held and held.fusable
    assert not isinstance(model.blocks[1].attn, OpenAttention)


def test_a_copied_block_becomes_plain_too() -> None:
    stack = Stack([Mesa()])
    model = stack.enter(stack.prepare(vit()), FIT)
    model.blocks.append(copy.deepcopy(model.blocks[0]))  # a method that grows may copy before the phase is left
    model = stack.leave(model, FIT)
    assert not any(isinstance(m, OpenAttention) or is_packed(m) for m in model.modules())


def test_two_forward_passes_before_the_backward_pass() -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def gradient(model: nn.Module) -> Tensor:
        model.train()
        one = model(x)
        two = model(30 * x)  # moves every range
        (one.sum() + two.sum()).backward()
        return model.blocks[0].mlp.fc1.weight.grad

    plain = vit()
    packed = packing(copy.deepcopy(plain))
    exact, ours = gradient(plain), gradient(packed)
    assert (ours - exact).norm() < 0.1 * exact.norm()


def test_checkpointed_blocks_move_their_ranges_once() -> None:
    results = []
    for checkpointed in (False, True):
        method = Mesa(rounding="nearest")
        stack = Stack([method])
        model = stack.enter(stack.prepare(vit()), FIT)
        model.set_grad_checkpointing(checkpointed)
        for _ in range(2):
            grads = train_pass(model)[1]
        results.append((method.state_dict()["ranges"], grads))
    (ranges, grads), (again, recomputed) = results
    assert {p: s["seen"] for p, s in ranges.items()} == {p: s["seen"] for p, s in again.items()}
    assert all(torch.equal(s["bounds"], again[p]["bounds"]) for p, s in ranges.items())
    for name, g in grads.items():
        torch.testing.assert_close(recomputed[name], g, atol=1e-5, rtol=1e-4)


def test_roundings_follow_from_the_step_alone() -> None:
    def gradients(step: Step) -> list[Tensor]:
        method = Mesa()
        stack = Stack([method])
        model = stack.enter(stack.prepare(vit()), FIT)
        batch = {"image": image(model), "target": torch.arange(4)}
        stack.loader("train", lambda s: batch)(step)
        params = stack.groups(model)["weights"]
        stack.grads(Classification().loss)(model.train(), batch, step, params)
        return [p.grad for p in params]

    same = [gradients(Step("fit", "main", 3, 9, seed=1)) for _ in range(2)]
    other = gradients(Step("fit", "main", 4, 9, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(same[0], other, strict=True))


def test_a_model_of_nothing_to_pack_is_refused() -> None:
    with pytest.raises(GossamerError, match="no layer of kinds"):
        Stack([Mesa()]).prepare(nn.Sequential(nn.Flatten(), nn.Tanh()))
