"""Growing networks: source maps, operators, sub-networks, inputs of other sizes; ViT and VOLO."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.volo import VOLO
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.kits.example import tiny_vit
from gossamer.kits.growth.depth import OPERATORS, blocks_of, grow, interpolation, new_blocks, put_blocks, stacking
from gossamer.kits.growth.elastic import Elastic, active_blocks
from gossamer.kits.growth.timer import step_seconds
from gossamer.models.growing import branch_outputs, drop_rate, growth_layout, resizable, set_drop_rate
from gossamer.ops.positions import resize_grid

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tiny_volo() -> nn.Module:
    torch.manual_seed(0)
    size = {"layers": [2, 1, 2, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2], "stem_hidden_dim": 8}
    return VOLO(num_classes=5, img_size=64, **size).eval()


def run(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images)


@given(st.integers(1, 30), st.integers(0, 30))
def test_interpolation_keeps_order_and_every_block(old: int, more: int):
    new = old + min(more, old)
    source = interpolation(old, new)
    assert source == sorted(source) and set(source) == set(range(old)) and len(source) == new
    assert len(new_blocks(old, new)) == new - old
    assert interpolation(old, old) == list(range(old)) and stacking(old, 2 * old) == [*range(old), *range(old)]


def test_interpolation_doubles_the_last_blocks_in_place():
    assert interpolation(6, 8) == [0, 1, 2, 3, 4, 4, 5, 5] and new_blocks(6, 8) == [5, 7]
    assert interpolation(6, 12) == [i // 2 for i in range(12)]
    assert new_blocks(8, 14) == [3, 5, 7, 9, 11, 13]


@given(st.integers(1, 16), st.data())
def test_subnetworks_are_nested(least: int, data: st.DataObject):
    most = data.draw(st.integers(least, 2 * least))
    nets = [set(active_blocks(least, most, d)) for d in range(least, most + 1)]
    assert all(a < b for a, b in zip(nets, nets[1:], strict=False))
    assert [len(n) for n in nets] == list(range(least, most + 1))
    assert nets[0] == set(range(most)) - set(new_blocks(least, most))


def averages(model: nn.Module, value: float) -> list[dict[str, torch.Tensor]]:
    chain = growth_layout(model).chains[0]
    return [{k: torch.full_like(v, value) for k, v in b.state_dict().items()} for b in blocks_of(model, chain)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_blocks_that_are_there_stay_and_new_ones_are_filled(operator: str):
    model = tiny_vit()
    chain = growth_layout(model).chains[0]
    old = blocks_of(model, chain)
    before = copy.deepcopy(model.state_dict())
    seen: list[int] = []
    old[2].register_forward_hook(lambda *_: seen.append(1))
    grown = grow(old, 5, operator, averages=averages(model, 7.0), generator=torch.Generator().manual_seed(0))
    assert [b for b in grown if b in old] == old and len({id(b) for b in grown}) == 5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    new = next(b for b in grown if b not in old)
    weight, source = new.attn.qkv.weight, old[0 if operator == "stack" else 1].attn.qkv.weight
    if operator in ("interpolate", "stack", "identity"):
        assert torch.equal(weight, source)
    elif operator == "mogrow":
        assert weight.eq(7).all() and new.norm1.bias.eq(7).all()
    elif operator == "noise":
        assert 0.005 < (weight - source).std().item() < 0.02
    else:
        assert 0.015 < weight.std().item() < 0.025 and new.norm1.weight.eq(1).all() and new.attn.qkv.bias.eq(0).all()
    put_blocks(model, chain, grown)
    run(model)
    assert seen == [1], "a copy reports to the listeners of its source"


def test_only_identity_growth_keeps_the_function():
    model = tiny_vit()
    chain, expected = growth_layout(model).chains[0], run(model)
    for operator, kept in (("identity", True), ("interpolate", False)):
        deeper = copy.deepcopy(model)
        put_blocks(deeper, chain, grow(blocks_of(deeper, chain), 6, operator))
        assert len(deeper.blocks) == 6 and torch.allclose(run(deeper), expected, atol=1e-6) == kept
        back = [b for i, b in enumerate(blocks_of(deeper, chain)) if i not in new_blocks(3, 6)]
        put_blocks(deeper, chain, back)
        assert torch.equal(run(deeper), expected)


def test_growth_refuses_what_is_no_growth():
    blocks = blocks_of(tiny_vit(), growth_layout(tiny_vit()).chains[0])
    with pytest.raises(ModelError, match="did you mean 'mogrow'"):
        grow(blocks, 4, "mogro")
    with pytest.raises(ModelError, match="from 3 to 2 blocks"):
        grow(blocks, 2)
    with pytest.raises(ModelError, match="averages"):
        grow(blocks, 4, "mogrow")
    with pytest.raises(ModelError, match="at most doubled"):
        active_blocks(2, 5, 3)


@pytest.mark.parametrize("make", [tiny_vit, tiny_volo])
def test_running_and_extracted_subnetworks_are_the_same(make):
    model = make()
    layout = growth_layout(model)
    least = tuple(max(1, (c.depth + 1) // 2) for c in layout.chains)
    elastic = Elastic(layout.chains, least, tuple(c.depth for c in layout.chains))
    images = torch.randn(2, 3, layout.size, layout.size)
    full, names = run(model, images), list(model.state_dict())
    with elastic.running(model, least):
        inside, few = run(model, images), sum(p.numel() for p in model.parameters())
        model(images).sum().backward()
    idle = [p for b in elastic.blocks(model, elastic.most)[0] for p in b.parameters() if p.grad is None]
    assert idle and torch.equal(run(model, images), full) and list(model.state_dict()) == names
    elastic.extract(model, least)
    assert torch.equal(run(model, images), inside) and sum(p.numel() for p in model.parameters()) == few
    assert [len(blocks_of(model, c)) for c in layout.chains] == list(least)


def test_volo_chains_run_over_several_containers():
    layout = growth_layout(tiny_volo())
    assert [(c.containers, c.full) for c in layout.chains] == [
        (("network.0",), (2,)),
        (("network.2", "network.3", "network.4"), (1, 2, 1)),
    ]
    assert (layout.size, layout.stride, layout.depth) == (64, 16, 6)
    assert type(layout).from_json(layout.to_json()) == layout


@pytest.mark.parametrize("make", [tiny_vit, tiny_volo, lambda: tiny_vit("deit_tiny_distilled_patch16_224")])
def test_inputs_of_any_size_and_back(make):
    model = make()
    layout = growth_layout(model)
    images = torch.randn(2, 3, layout.size, layout.size)
    expected, names = run(model, images), list(model.state_dict())
    free = resizable(model, layout, on=True)
    assert torch.equal(run(free, images), expected) and list(free.state_dict()) == names
    half = layout.size // 2
    assert run(free, images[:, :, :half, :half]).shape == expected.shape
    free(images[:, :, :half, :half]).sum().backward()
    assert free.pos_embed.grad.abs().sum() > 0
    plain = resizable(free, layout, on=False)
    assert type(plain) is type(make()) and torch.equal(run(plain, images), expected)


def test_stochastic_depth_is_set_and_taken_off():
    block = tiny_vit(drop_path_rate=0.2).blocks[2]
    assert drop_rate(block) == pytest.approx(0.2)
    set_drop_rate(block, 0.0)
    assert drop_rate(block) == 0.0 and isinstance(block.drop_path1, nn.Identity)
    assert growth_layout(tiny_vit(drop_path_rate=0.2)).drop_path == pytest.approx(0.2)
    assert [m.out_features for m in branch_outputs(block)] == [32, 32]


def test_models_that_cannot_grow_are_named():
    with pytest.raises(ModelError, match="Sequential: growth needs"):
        growth_layout(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="square"):
        growth_layout(tiny_vit(img_size=(32, 64)))


def test_positions_at_their_own_grid_are_themselves():
    grid = torch.randn(1, 4, 4, 3)
    assert resize_grid(grid, (4, 4)) is grid
    flat = torch.ones(1, 4, 4, 3)
    assert torch.allclose(resize_grid(flat, (7, 2)), torch.ones(1, 7, 2, 3), atol=1e-5)


def test_timer_takes_the_median_and_leaves_no_gradients():
    layer, naps = nn.Linear(2, 2), iter([0.0, 0.02, 0.3, 0.02])

    def step():
        time.sleep(next(naps))
        layer(torch.ones(1, 2)).sum().backward()

    assert 0.02 <= step_seconds(step, 3, torch.device("cpu"), list(layer.parameters())) < 0.2
    assert layer.weight.grad is None
