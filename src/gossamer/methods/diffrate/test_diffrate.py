"""DiffRate's mathematics against the release (``oracle.json``) and against its own properties."""

from __future__ import annotations

import copy
import json
import math
import tomllib
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.saved import saved_tensors
from gossamer.kits.token_reduction import source_maps, token_blocks, token_macs
from gossamer.methods.diffrate import DiffRate
from gossamer.methods.diffrate.layers import GatedBlock, ReducedBlock
from gossamer.methods.diffrate.schedules import Free, Schedule, fit_schedule, released, resolve_schedule
from gossamer.models.timm_adapter import token_view
from gossamer.ops.token_merge import assignment, match_cosine, merge_mean, merge_size
from gossamer.ops.token_rates import TokenMacs, keep_mask, keep_probability, kept_count, masked_softmax
from gossamer.ops.tokens import find_track

ORACLE = json.loads(Path(__file__).with_name("oracle.json").read_text())
FIGURES = {f["name"]: f for f in tomllib.loads(Path(__file__).with_name("figures.toml").read_text())["figure"]}
LABELS = torch.tensor([1, 4, 7])


def wave(shape: tuple[int, ...], seed: float, scale: float = 1.0) -> Tensor:
    """Return fixed pseudo-random numbers in [-scale, scale] that need no generator."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    v = torch.sin(i * 12.9898 + seed * 78.233) * 43758.5453
    return (((v - v.floor()) * 2 - 1) * scale).float().reshape(shape)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Give the model the weights the oracle run used."""
    for k, (n, p) in enumerate(sorted(model.state_dict().items())):
        if n.endswith(("norm1.weight", "norm2.weight")) or n == "norm.weight":
            p.copy_(1 + wave(p.shape, k, 0.1))
        elif p.dim() > 1 and "pos_embed" not in n and "token" not in n:
            p.copy_(wave(p.shape, k, 2 / math.sqrt(p[0].numel())))
        else:
            p.copy_(wave(p.shape, k, 0.5 if "embed" in n or "token" in n else 0.1))
    return model


def small(**options) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return fill(timm.create_model("vit_tiny_patch16_224", **{**shape, **options}))


def finished(model: nn.Module, **options) -> nn.Module:
    return Stack([DiffRate(**options)]).prepare(model).eval()


def searching(model: nn.Module, method: DiffRate) -> tuple[Stack, nn.Module, Phase]:
    stack = Stack([method])
    model = stack.prepare(model)
    phase = stack.phases(Plan())[0]
    return stack, stack.enter(model, phase), phase


def spread(model: nn.Module) -> None:
    """Give the rates values at which every block both prunes and merges."""
    for block in token_blocks(model)[1:]:
        for name, seed, shift in (("prune_logits", 20, 0.0), ("merge_logits", 40, 0.4)):
            logits, top = getattr(block, name), 2.2 - block.index * 0.9 - shift
            logits.data = wave(logits.shape, seed + block.index, 0.5) + torch.linspace(top, -top, len(logits))


def close(actual: Tensor, expected: list[float], tol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach().flatten(), torch.tensor(expected).float(), rtol=tol, atol=tol)


# -- against the release -----------------------------------------------------------------------------
@pytest.mark.parametrize("granularity", [1, 4])
def test_rates_equal_the_release(granularity: int) -> None:
    oracle = ORACLE[f"rates/{granularity}"]
    candidates = torch.arange(196, 0, -granularity).float()
    logits = wave((len(candidates),), granularity, 2.0).requires_grad_()
    kept, q = kept_count(logits, candidates, 1), keep_probability(logits, candidates, 1, 197)
    mask = keep_mask(q, int(kept), 150)
    assert int(kept) == oracle["kept"]
    close(q[::7], oracle["probability"])
    close(mask, oracle["mask"])
    close(torch.autograd.grad(kept, logits, retain_graph=True)[0][::5], oracle["grad_kept"], 1e-5)
    close(torch.autograd.grad((mask * wave((197,), 9)).sum(), logits)[0][::5], oracle["grad_mask"])


def test_merge_equals_the_release() -> None:
    oracle, x = ORACLE["merge"], wave((2, 20, 8), 1)
    size = 1 + wave((2, 20), 2).abs()
    dst, src = x[:, :12], x[:, 12:]
    index, similarity = match_cosine(src, dst, 1)
    groups = assignment(index, 12, x.dtype)
    close(similarity, oracle["similarity"])
    close(merge_mean(dst, src, groups), oracle["merged"])
    close(merge_size(size[:, :12], size[:, 12:], groups, similarity), oracle["size"])


def test_masked_softmax_equals_the_release() -> None:
    oracle = ORACLE["softmax"]
    scores = wave((2, 2, 10, 10), 3, 3.0).requires_grad_()
    mask = (wave((2, 10), 4) > -0.3).float().requires_grad_()
    attn = masked_softmax(scores, mask)
    close(attn, oracle["attn"])
    to_scores, to_mask = torch.autograd.grad((attn * wave((2, 2, 10, 10), 5)).sum(), (scores, mask))
    close(to_scores, oracle["grad_scores"])
    close(to_mask, oracle["grad_policy"], 1e-5)


def test_deit_small_forward_equals_the_release() -> None:
    model = finished(fill(timm.create_model("deit_small_patch16_224")), schedule="deit_small/2.9")
    with torch.no_grad():
        close(model(wave((2, 3, 224, 224), 6))[:, ::10], ORACLE["deit_small/2.9"]["logits"], 1e-4)


def test_small_forward_equals_the_release() -> None:
    model = finished(small(), schedule={"prune": [37, 30, 20, 9], "merge": [37, 26, 17, 9]})
    close(model(wave((3, 3, 48, 48), 7)), ORACLE["small/eval"]["logits"], 1e-5)


def test_search_forward_and_gradients_equal_the_release() -> None:
    oracle, method = ORACLE["small/train"], DiffRate(macs="80%", start="uniform")
    _, model, _ = searching(small(), method)
    spread(model)
    logits = model.train()(wave((3, 3, 48, 48), 7))
    close(logits, oracle["logits"], 1e-5)
    counts = [[int(b.count(b.prune_logits)), int(b.count(b.merge_logits))] for b in token_blocks(model)]
    assert counts == oracle["kept"]
    macs = method.expected_macs(model) + 3 * 8 * 8 * 32  # the release counts the class token in the patch embedding
    assert macs.item() == pytest.approx(oracle["macs"], rel=1e-6)
    loss = nn.functional.cross_entropy(logits, LABELS) + 5e5 * (macs / 1e9 - 0.0015) ** 2
    loss.backward()
    for key, expected in oracle["grad"].items():
        index, name = key.split(".")
        close(getattr(token_blocks(model)[int(index)], f"{name}_logits").grad, expected, 2e-5)


SHAPES = {
    "deit_tiny": (192, 16, 197, 12),
    "deit_small": (384, 16, 197, 12),
    "deit_base": (768, 16, 197, 12),
    "mae_base": (768, 16, 197, 12),
    "mae_large": (1024, 16, 197, 24),
    "mae_huge": (1280, 14, 257, 32),
}


def test_macs_of_every_released_list_equal_the_release() -> None:
    assert len(released()) == 28
    for key, expected in ORACLE["macs"].items():
        width, patch, n, depth = SHAPES[key.split("/")[0]]
        fixed = n * width * 3 * patch * patch + width * 1000
        c2 = width * width
        cost = TokenMacs(n, fixed, (4 * c2,) * depth, (2 * width,) * depth, (8 * c2,) * depth)
        found = cost(resolve_schedule(key, depth, n, 1).merge) if "/" in key else cost.dense
        assert found == pytest.approx(expected, rel=1e-6), key


def test_macs_of_a_timm_model_match_the_sheet() -> None:
    model = timm.create_model("deit_small_patch16_224")
    cost = token_macs(model, token_view(model))
    assert cost.dense / 1e9 == pytest.approx(4.599, rel=0.0005)
    assert cost(resolve_schedule("deit_small/2.9", 12, 197, 1).merge) / 1e9 == pytest.approx(2.905, rel=0.0005)


# -- properties --------------------------------------------------------------------------------------
VARIANTS = [
    ("vit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {"init_values": 0.7}),
    ("vit_small_patch14_reg4_dinov2", {"init_values": 0.7, "num_classes": 10}),
    ("vit_small_patch16_224", {"qk_norm": True}),
    ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_base_patch16_224", {"global_pool": "avg"}),
    ("vit_medium_patch16_reg4_gap_256", {}),
]


def variant(name: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    return timm.create_model(name, **{**shape, **options}).eval()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}{'-'.join(o)}" for n, o in VARIANTS])
def test_variants_are_identical_at_zero_compression_and_shrink(name: str, options: dict) -> None:
    plain, x = variant(name, options), wave((2, 3, 64, 64), 1)
    n = token_view(plain).num_tokens
    with torch.no_grad():
        same = finished(copy.deepcopy(plain), schedule={"merge": [n] * 3})
        torch.testing.assert_close(same(x), plain(x), atol=1e-6, rtol=1e-6)
        p = token_view(plain).num_prefix
        less = finished(copy.deepcopy(plain), schedule={"prune": [n, p + 9, p + 4], "merge": [n - 3, p + 7, p + 2]})
        assert less(x).shape == plain(x).shape
        assert find_track(less).size[-1].shape[1] == p + 2
    assert less.state_dict().keys() == plain.state_dict().keys()


def test_patch_order_does_not_matter() -> None:
    model = finished(small(), schedule={"prune": [37, 30, 20, 9], "merge": [35, 26, 17, 9]})
    tokens = torch.cat((wave((2, 37, 32), 5),), 1)
    shuffled = torch.cat((tokens[:, :1], tokens[:, 1 + torch.randperm(36)]), 1)
    with torch.no_grad():
        a, b = (model.forward_head(model.norm(model.blocks(t))) for t in (tokens, shuffled))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_merging_identical_tokens_changes_nothing() -> None:
    """Two equal tokens merged, then log(size) attention, equal not merging (similarity is 1)."""
    dense, merging = small(depth=2), small(depth=2)
    merging = finished(merging, schedule={"merge": [36, 36]})
    tokens = wave((1, 37, 32), 3, 0.3)
    tokens[:, 5] = tokens[:, 9]
    with torch.no_grad():
        order = token_blocks(merging)[0].importance
        token_blocks(merging)[0].importance = lambda *a: _pair_last(order(*a))
        a = merging.forward_head(merging.norm(merging.blocks(tokens)))
        b = dense.eval().forward_head(dense.norm(dense.blocks(tokens)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _pair_last(importance: Tensor) -> Tensor:
    """Rank token 9 last, so that it is the one merged away (into its twin, token 5)."""
    importance = importance.clone()
    importance[:, 8] = -1
    return importance


def test_masked_search_equals_physical_pruning() -> None:
    """Masked forward without drop-path equals dropping the tokens, for pruning exactly up to the smoothing."""
    _, model, _ = searching(small(), DiffRate(macs="60%", merge=False))
    plain = finished(
        small(), schedule={"prune": [int(b.count(b.prune_logits)) for b in token_blocks(model)]}, merge=False
    )
    x = wave((3, 3, 48, 48), 7)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), atol=1e-4, rtol=1e-4)


def test_masked_search_equals_physical_merging_with_equal_clamps() -> None:
    options = {"macs": "60%", "prune": False, "clamp_search": False}
    _, model, _ = searching(small(), DiffRate(**options))
    counts = [int(b.count(b.merge_logits)) for b in token_blocks(model)]
    plain, x = finished(small(), schedule={"merge": counts}), wave((3, 3, 48, 48), 7)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), atol=1e-3, rtol=1e-3)


def test_task_loss_reaches_the_rates_and_not_the_frozen_weights() -> None:
    stack, model, _ = searching(small(), DiffRate(macs="60%"))
    groups = stack.groups(model)
    for p in groups["weights"]:
        p.requires_grad_(False)
    spread(model)
    nn.functional.cross_entropy(model.train()(wave((3, 3, 48, 48), 7)), LABELS).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in groups["arch"][:4])
    assert all(p.grad is None for p in groups["weights"])


def search(model: nn.Module, method: DiffRate, task: bool = True) -> nn.Module:
    """Run the search as a user's own loop would."""
    stack, model, phase = searching(model, method)
    params = stack.groups(model)["arch"]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in params))
    images = wave((3, 3, 48, 48), 7)

    def task_loss(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(batch["image"])
        loss = nn.functional.cross_entropy(out, batch["target"])
        return out, {"task": loss if task else loss * 0}

    grads = stack.grads(task_loss, phase.turns[0])
    optimizer = torch.optim.AdamW(params, lr=phase.lr["arch"], weight_decay=0)
    for i in range(phase.steps):
        grads(model, {"image": images, "target": LABELS}, Step(phase.name, "main", i, phase.steps), params)
        optimizer.step()
        optimizer.zero_grad()
    return stack, stack.finish(stack.leave(model.eval(), phase))


@pytest.mark.parametrize(
    "options",
    [{}, {"start": "uniform"}, {"device_aware": True, "tile": 4, "blocks": [0, 1, 2, 3], "protected_blocks": []}],
)
def test_search_meets_its_budget(options: dict) -> None:
    method = DiffRate(macs="70%", search_steps=30, lr=0.1, budget_unit="relative", **options)
    stack, model = search(small(), method, task=False)
    facts = method.describe(model)["facts"]
    assert 0.69 <= facts["macs_share"] <= 0.70
    assert all(isinstance(b, ReducedBlock) for b in token_blocks(model))
    assert model.state_dict().keys() == small().state_dict().keys()
    if "tile" in options:
        assert all(n % 4 == 0 or n == 37 for n in method.describe(model)["tokens"]["after_merge"][:-1])
    again = Stack([method]).replay(small(), stack.lasting_edits()).eval()
    x = wave((3, 3, 48, 48), 7)
    torch.testing.assert_close(again(x), model(x))


def test_search_without_task_reaches_the_budget_by_itself() -> None:
    method = DiffRate(macs="70%", search_steps=80, lr=0.05, budget_unit="relative", start="uniform")
    stack, _ = search(small(), method, task=False)
    found = stack.edits[-1][1]["searched"]
    cost = token_macs(small(), token_view(small()))
    assert cost(found["merge"]) / cost.dense == pytest.approx(0.70, rel=0.02)


def test_dense_targets_need_no_labels_and_vanish_with_nothing_reduced() -> None:
    method = DiffRate(macs="70%", targets="dense", budget_unit="relative")
    stack, model, phase = searching(small(), method)
    batch, step = {"image": wave((3, 3, 48, 48), 7)}, Step(phase.name, "main", 0, 10)
    plain = small().eval()(batch["image"])
    terms = method.loss(model, batch, plain, step)
    entropy = torch.distributions.Categorical(logits=plain).entropy().mean()
    torch.testing.assert_close(terms["task"], entropy, atol=1e-5, rtol=1e-5)
    assert method.loss(model, batch, model(batch["image"]), step)["task"] > entropy
    assert model.training, "the dense pass must not leave the model in evaluation mode"


def test_without_a_budget_term_more_tokens_stay() -> None:
    method = DiffRate(macs="60%", search_steps=20, lr=0.05, budget_weight=0.0)
    stack, model, phase = searching(small(), method)
    before = method.expected_macs(model).item()
    stack, _ = search(small(), method)
    cost = token_macs(small(), token_view(small()))
    assert cost(stack.edits[-1][1]["searched"]["merge"]) > before * 0.9


def test_sources_partition_the_patches() -> None:
    model = finished(small(), schedule={"prune": [37, 30, 20, 9], "merge": [35, 26, 17, 9]})
    track = find_track(model)
    track.trace = True
    model(wave((2, 3, 48, 48), 1))
    n = 37
    for source in track.source[1:]:
        assert source.sum(1).amax() == 1, "a patch is in two groups"
        assert source.shape[2] == n
        assert source[:, 0, 0].eq(1).all()
    maps = source_maps(model, wave((2, 3, 48, 48), 1))
    assert maps["grid"] == (6, 6)
    assert maps["groups"][-1].unique().numel() <= 9
    assert (maps["groups"][-1] == -1).any()


def test_copies_do_not_share_their_track() -> None:
    model = finished(small(), schedule={"merge": [37, 30, 20, 10]})
    twin = copy.deepcopy(model)
    assert find_track(twin) is not find_track(model)
    assert len({id(b.track) for b in token_blocks(twin)}) == 1


@pytest.mark.parametrize("device_aware", [False, True])
def test_search_memory_is_less_than_that_of_a_plain_step(device_aware: bool) -> None:
    """On DeiT-S itself, against a training step with unfused attention; bytes scale with the batch."""
    model, x = timm.create_model("deit_small_patch16_224"), torch.zeros(2, 3, 224, 224)
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = False
    plain = sum(s.bytes for s in saved_tensors(model, (x,)))
    _, model, _ = searching(model, DiffRate(macs="60%", device_aware=device_aware))
    for n, p in model.named_parameters():
        p.requires_grad_(n.endswith("_logits"))
    ratio = sum(s.bytes for s in saved_tensors(model, (x,))) / plain
    known = FIGURES["search_memory_ratio_aware" if device_aware else "search_memory_ratio"]
    assert ratio == pytest.approx(known["value"], abs=known["tolerance"])
    assert ratio <= 1.1


@pytest.mark.parametrize("options", [{}, {"merge": False}, {"device_aware": True, "tile": 4, "protected_blocks": []}])
def test_a_ramp_starts_near_the_budget(options: dict) -> None:
    method = DiffRate(macs="70%", **options)
    stack, model, _ = searching(small(), method)
    prune, merge = stack.edits[-1][1]["start"]
    cost = token_macs(small(), token_view(small()))
    assert 0.6 * cost.dense < cost(merge) <= 0.7 * cost.dense
    assert all(m <= p for p, m in zip(prune, merge, strict=True))
    assert method.expected_macs(model).item() / cost.dense == pytest.approx(0.7, abs=0.1)


# -- schedules and refusals --------------------------------------------------------------------------
def test_fit_schedule_lands_on_the_budget() -> None:
    cost = TokenMacs(65, 0, (4,) * 6, (1,) * 6, (8,) * 6)
    free = [None] + [Free([1 - i / 65 for i in range(65)], [1.0] * 65, 1, 2)] * 5
    start = Schedule.monotone([65] * 6, [65] * 6, 65)
    for share in (0.4, 0.6, 0.8):
        fitted = fit_schedule(start, free, cost, int(share * cost.dense))
        assert 0.99 * share * cost.dense <= cost(fitted.merge) <= share * cost.dense
        low = fit_schedule(
            Schedule.monotone([65, 2, 2, 2, 2, 2], [65, 2, 2, 2, 2, 2], 65), free, cost, int(share * cost.dense)
        )
        assert 0.99 * share * cost.dense <= cost(low.merge) <= share * cost.dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "5%"}, "Reachable are"),
        ({"macs": "120%"}, "Reachable are"),
        ({"macs": "much"}, "expected a share"),
        ({"schedule": "deit_smal/2.9"}, "did you mean 'deit_small/2.9'"),
        ({"schedule": "deit_small/2.9"}, "the model has 4 blocks of 37"),
        ({"schedule": {"merge": [37, 30]}}, "has 2 counts"),
        ({"schedule": {"merge": [37, 30, 20, 1]}}, "keeps 1 tokens; allowed are 2..37"),
        ({"schedule": {"keep": [1]}}, "allowed are 'prune' and 'merge'"),
        ({"start": "top"}, "allowed are ramp, uniform"),
        ({"importance": "size"}, "allowed are attention, order"),
        ({"prune": False, "merge": False}, "both off"),
        ({"search_steps": 0}, "expected 1 or more"),
        ({"blocks": [9]}, "blocks 0..3"),
        ({"blocks": [0]}, "every block is protected"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Stack([DiffRate(**options)]).prepare(small())


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_other_models_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match="expected"):
        DiffRate().prepare(model)


def test_a_reduced_model_is_not_reduced_again() -> None:
    model = finished(small(), schedule={"merge": [37, 30, 20, 10]})
    with pytest.raises(ModelError, match="already reduced"):
        DiffRate().prepare(model)


def test_an_attention_mask_is_refused() -> None:
    model = finished(small(), schedule={"merge": [37, 30, 20, 10]})
    with pytest.raises(ModelError, match="attention mask"):
        model.blocks[0](torch.zeros(1, 37, 32), attn_mask=torch.zeros(37, 37))


def test_gates_exist_only_during_the_search() -> None:
    stack, model, phase = searching(small(), DiffRate(macs="60%"))
    assert isinstance(model.blocks[1], GatedBlock)
    assert len(stack.groups(model)["arch"]) == 6
    model = stack.leave(model, phase)
    assert "arch" not in stack.groups(model)


def test_search_may_read_images_of_its_own() -> None:
    for loader in ("train", "search"):
        plan = DiffRate(search_loader=loader).phases(Plan([Phase("fit", 1)]))
        assert [t.loader for p in plan for t in p.turns] == [loader, "train"]


def test_finishing_without_the_search_is_an_error() -> None:
    stack = Stack([DiffRate(macs="70%")])
    with pytest.raises(PlanError, match="the phase 'diffrate.search' was not run"):
        stack.finish(stack.prepare(small()))
    reduced = Stack([DiffRate(schedule={"merge": [37, 30, 20, 10]})])
    reduced.finish(reduced.prepare(small()))
