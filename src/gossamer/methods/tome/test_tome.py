"""ToMe's mathematics against the release (``oracle.json``) and against its own properties."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.core.stack import Stack
from gossamer.kits.token_reduction import source_maps, token_blocks
from gossamer.methods.tome import ToMe
from gossamer.methods.tome.method import merge_schedule
from gossamer.ops.token_merge import gather_groups, match_bipartite
from gossamer.ops.tokens import find_track

ORACLE = json.loads(Path(__file__).with_name("oracle.json").read_text())


def wave(shape: tuple[int, ...], seed: float) -> Tensor:
    """Return fixed pseudo-random numbers in [-1, 1] that need no generator."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    v = torch.sin(i * 12.9898 + seed * 78.233) * 43758.5453
    return ((v - v.floor()) * 2 - 1).float().reshape(shape)


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **options}).eval()


def merged(**options) -> nn.Module:
    return Stack([ToMe(**options)]).prepare(small())


@pytest.mark.parametrize(("key", "num_prefix", "n"), [("merge/10", 1, 21), ("merge/11", 2, 22), ("merge/00", 0, 20)])
def test_matching_equals_the_release(key: str, num_prefix: int, n: int) -> None:
    oracle = ORACLE[key]
    x, size = wave((2, n, 6), 12), 1 + wave((2, n, 1), 13).abs().round(decimals=3)
    match = match_bipartite(wave((2, n, 8), 11), 6, num_prefix, ordered=num_prefix > 0)
    total = gather_groups(size, match)
    value = gather_groups(x * size, match) / total
    source = gather_groups(torch.eye(n).expand(2, -1, -1), match)
    torch.testing.assert_close(total.flatten(), torch.tensor(oracle["size"]))
    torch.testing.assert_close(value.flatten(), torch.tensor(oracle["x"]), atol=1e-6, rtol=1e-5)
    assert source.int().flatten().tolist() == oracle["source"]


@pytest.mark.parametrize("case", ORACLE["parse_r"], ids=lambda c: f"{c['depth']}-{c['r']}-{c['inflection']}")
def test_schedule_equals_the_release(case: dict) -> None:
    assert merge_schedule(case["depth"], case["r"], case["inflection"]) == case["result"]


@pytest.mark.parametrize(("r", "last"), [(8, 101), (13, 41), (16, 11)])
def test_token_counts_match_the_sheet(r: int, last: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    described = ToMe(r=r).describe(Stack([ToMe(r=r)]).prepare(model))
    assert described["tokens"]["after_merge"][-1] == last
    if r == 13:
        assert described["facts"]["macs"] / 1e9 == pytest.approx(2.703, rel=0.001)


def test_no_merging_is_the_plain_model() -> None:
    x = wave((2, 3, 64, 64), 1)
    with torch.no_grad():
        torch.testing.assert_close(merged(r=0)(x), small()(x), atol=1e-6, rtol=1e-6)


def test_sizes_keep_their_sum_and_sources_their_partition() -> None:
    model = merged(r=9)
    track = find_track(model)
    track.trace = True
    with torch.no_grad():
        model(wave((2, 3, 64, 64), 1))
    for size, source in zip(track.size[1:], track.source[1:], strict=True):
        torch.testing.assert_close(size.sum(1), torch.full((2,), 65.0))
        torch.testing.assert_close(source.sum(1), torch.ones(2, 65))
        torch.testing.assert_close(source.sum(2), size)
    assert (source_maps(model, wave((2, 3, 64, 64), 1))["groups"][-1] >= 0).all()


def test_merging_identical_tokens_changes_nothing() -> None:
    """Equal tokens merged, then log(size) attention, equal not merging."""
    dense, model = small(depth=2), Stack([ToMe(r=[1])]).prepare(small(depth=2))
    tokens = wave((1, 65, 32), 3)
    tokens[:, 5] = tokens[:, 10]
    with torch.no_grad():
        a = model.forward_head(model.norm(model.blocks(tokens)))
        b = dense.forward_head(dense.norm(dense.blocks(tokens)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"inflection": -1.0}])
def test_budget_is_met(options: dict) -> None:
    method = ToMe(macs="70%", **options)
    facts = method.describe(Stack([method]).prepare(small()))["facts"]
    assert 0.693 <= facts["macs_share"] <= 0.70


def test_prefix_tokens_stay_in_front() -> None:
    options = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **{**options, "img_size": 56}).eval()
    model = Stack([ToMe(r=3)]).prepare(model)
    track = find_track(model)
    track.trace = True
    with torch.no_grad():
        model(wave((2, 3, 56, 56), 1))
    prefix = track.source[-1][:, :5]
    torch.testing.assert_close(prefix, torch.eye(5, prefix.shape[2]).expand(2, -1, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "expected 0 or more"),
        ({"r": [1] * 9}, "at most 4 blocks"),
        ({"inflection": 2.0}, r"\[-1, 1\]"),
        ({"macs": "2%"}, "Reachable are"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Stack([ToMe(**options)]).prepare(small())


def test_a_reduced_model_is_refused() -> None:
    with pytest.raises(ModelError, match="already reduced"):
        ToMe().prepare(merged(r=2))


def test_state_dict_stays_that_of_timm() -> None:
    model = merged(r=4)
    assert model.state_dict().keys() == small().state_dict().keys()
    assert len(token_blocks(copy.deepcopy(model))) == 4
