"""Saved activations by hand count, by the formula of a transformer block, and where they hide."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.cost.ledger import cost
from gossamer.cost.saved import SavedTensor, saved_tensors

BATCH, TOKENS, WIDTH, HEADS = 2, 17, 24, 2
BNC, BHNN = BATCH * TOKENS * WIDTH, BATCH * HEADS * TOKENS**2
STATISTICS = 2 * 2 * BATCH * TOKENS * 4  # mean and 1 / deviation of both LayerNorms, in float32


def vit(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def in_block(found: list[SavedTensor], block: nn.Module) -> int:
    inside = set(block.modules())
    return sum(s.bytes for s in found if s.module in inside and not s.weight_copy)


@pytest.mark.parametrize(("dtype", "per_bnc", "per_bhnn"), [(None, 64, 4), (torch.bfloat16, 36, 2)])
def test_a_block_keeps_what_the_formula_says(dtype: torch.dtype | None, per_bnc: int, per_bhnn: int) -> None:
    model = vit(fused=False)
    found = saved_tensors(model, (torch.zeros(BATCH, 3, 32, 32),), dtype)
    for block in model.blocks:
        assert in_block(found, block) == per_bnc * BNC + per_bhnn * BHNN + STATISTICS
    copies = sum(s.bytes for s in found if s.weight_copy)
    linear = sum(p.numel() for n, p in model.blocks.named_parameters() if p.dim() == 2)
    assert copies == 0 if dtype is None else copies >= 2 * linear


def test_fused_attention_keeps_no_matrix() -> None:
    model = vit(fused=True)
    found = saved_tensors(model, (torch.zeros(BATCH, 3, 32, 32),))
    assert not any(s.op == "softmax" for s in found)
    assert in_block(found, model.blocks[0]) < 64 * BNC + 4 * BHNN


def test_rows_add_up_and_name_their_operators() -> None:
    got = cost(vit(fused=False), torch.zeros(BATCH, 3, 32, 32))
    rows = {r.name: r.saved_bytes for r in got.per_layer}
    assert sum(rows.values()) == sum(got.saved_by_operator.values()) == got.saved_activation_bytes
    assert rows["blocks.0.mlp.act"] == 16 * BNC
    assert got.saved_by_operator["gelu"] == 2 * 16 * BNC
    assert {"linear", "matmul", "softmax", "layer_norm", "conv2d"} <= got.saved_by_operator.keys()


class _Square(torch.autograd.Function):
    """Keeps one tensor by the rules and one behind autograd's back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        ctx.twice = [2 * x]
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.twice[0]


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Square.apply(x)


def test_autograd_functions_are_seen_through() -> None:
    net = nn.Sequential(nn.Linear(8, 4), Square(), nn.Linear(4, 2))
    found = saved_tensors(net, (torch.zeros(3, 8),))
    square = [s for s in found if s.module is net[1] or s.op in ("Square", "_Square")]
    assert sum(s.bytes for s in square) == 2 * 3 * 4 * 4
    assert sum(s.bytes for s in found) == 3 * (8 + 4 + 4 + 4) * 4


def test_shared_memory_counts_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x[:1])

    assert sum(s.bytes for s in saved_tensors(Both(), (torch.zeros(3, 4),))) == 3 * 4 * 4


def test_one_image_too_few_for_a_norm_counts_half_of_two() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64))
    one, four = (cost(model, torch.zeros(n, 8)).saved_activation_bytes for n in (1, 4))
    statistics = 2 * 64 * 4  # mean and 1 / deviation, whatever the batch
    assert one - statistics // 2 == (four - statistics) // 4 > 0
