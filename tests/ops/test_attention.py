"""Open attention: one projection or three, equal or different widths."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.kits.token_reduction import token_macs
from gossamer.models.timm_adapter import (
    attention_views,
    attention_widths,
    close_attention,
    open_attention,
    split_attention,
    token_view,
)
from gossamer.models.widths import build_vit
from gossamer.ops.attention import MatMul

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


def test_split_computes_the_same_and_trains_the_same(model: nn.Module) -> None:
    x, plain = torch.randn(2, 3, 32, 32), copy.deepcopy(model)
    split = split_attention(model, "blocks.0.attn")
    assert attention_widths(split) == (3, 8, 8)
    torch.testing.assert_close(model(x), plain(x))
    for m in (model, plain):
        m(x).square().sum().backward()
    fused = plain.get_submodule("blocks.0.attn.qkv")
    ours = torch.cat([split.get_submodule(n).weight.grad for n in "qkv"])
    torch.testing.assert_close(ours, fused.weight.grad)
    assert split_attention(model, "blocks.0.attn") is split


def test_split_keeps_what_is_frozen(model: nn.Module) -> None:
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in split_attention(model, "blocks.0.attn").parameters())


def test_what_ties_widths_is_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY, qk_norm=True)
    with pytest.raises(ModelError, match=r"'blocks.0.attn' has 'q_norm', 'k_norm'"):
        split_attention(model, "blocks.0.attn")


def test_different_widths_agree_with_the_formula_and_are_counted() -> None:
    torch.manual_seed(0)
    widths = {"embed": 24, "heads": [2, 3], "qk": [4, 8], "v": [12, 4], "mlp": [16, 40]}
    model = build_vit(widths, img_size=32, patch_size=8, num_classes=5).eval()
    attention = model.get_submodule("blocks.0.attn")
    x = torch.randn(2, 17, 24)
    q, k, v = (getattr(attention, n)(x).view(2, 17, 2, -1).transpose(1, 2) for n in "qkv")  # [2, 2, 17, 4 or 12]
    expected = (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v  # the scale stays that of heads of 64
    torch.testing.assert_close(attention(x), attention.proj(expected.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(attention.attend(x, need_attn=True).out, attention(x))
    macs = token_macs(model, token_view(model))
    assert macs.pairs == (2 * (4 + 12), 3 * (8 + 4))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_closing_gives_the_library_back_its_attention(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    views = attention_views(model)[:2]
    before = [model.get_submodule(v.name) for v in views]
    for view in views:
        open_attention(model, view.name)
    opened = model.get_submodule(views[0].name)
    opened.proj = nn.Linear(*reversed(opened.proj.weight.shape))  # parts that were exchanged go along
    opened.scores = nn.Identity()  # the library's attention could not compute this
    opened.holders += 1
    close_attention(model, views[0].name)
    assert model.get_submodule(views[0].name) is opened
    opened.scores = MatMul()
    assert open_attention(model, views[0].name) is opened  # somebody else needs it too
    close_attention(model, views[0].name)
    assert model.get_submodule(views[0].name) is opened
    for view, source in zip(views, before, strict=True):
        close_attention(model, view.name)
        assert model.get_submodule(view.name) is source
    assert before[0].proj is opened.proj and not torch.equal(model(x), plain)
