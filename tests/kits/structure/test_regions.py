"""Structures: sums, masks, cuts; on a plain network and on vision transformers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.kits.structure.regions import (
    Keep,
    Region,
    Structure,
    count_elements,
    cut,
    decode_keep,
    encode_keep,
    enforce,
    keep_all,
    keep_first,
    unit_sums,
)
from gossamer.kits.structure.vit import counts_of, open_blocks, slice_vit, vit_structures
from gossamer.models.contracts import replace_module
from gossamer.models.widths import widths_of

SIDE = 32
MODELS = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {},  # gated MLP
    "vit_base_patch16_clip_224": {"global_pool": "avg"},
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **{**shape, **MODELS.get(name, {})}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def _random_keep(structures: list[Structure], seed: int, kinds: set[str]) -> Keep:
    draw = torch.Generator().manual_seed(seed)
    keep = keep_all(structures)
    for s in structures:
        if s.kind in kinds:
            gone = torch.randperm(s.units, generator=draw)[: max(1, s.units // 3)]
            keep[s.name][gone] = False
    return keep


@pytest.mark.parametrize("name", MODELS)
def test_masked_and_sliced_agree(name: str) -> None:
    model, x = _model(name), torch.randn(2, 3, SIDE, SIDE)
    plain = model(x)
    open_blocks(model)
    torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)  # re-parameterised: nothing has changed
    structures = vit_structures(model)
    keep = _random_keep(structures, 1, {"head", "qk", "v", "mlp"})
    masked = copy.deepcopy(model)
    enforce(dict(masked.named_parameters()), structures, keep)
    slice_vit(model, structures, keep)
    assert not torch.allclose(masked(x), plain, atol=1e-2)
    torch.testing.assert_close(model(x), masked(x), atol=1e-5, rtol=1e-5)
    assert widths_of(model).heads == (2, 2)


def test_embedding_channels_differ_masked_and_sliced_through_the_norms_alone() -> None:
    """A masked channel still counts in LayerNorm's mean and variance, a cut one does not."""
    model, x = _model("vit_tiny_patch16_224"), torch.randn(2, 3, SIDE, SIDE)
    open_blocks(model)
    structures = vit_structures(model)
    keep = _random_keep(structures, 2, {"emb"})
    masked = copy.deepcopy(model)
    enforce(dict(masked.named_parameters()), structures, keep)
    sliced = slice_vit(copy.deepcopy(model), structures, keep)
    assert (sliced(x) - masked(x)).abs().max() > 1e-2
    for m in (sliced, masked):
        for name in [n for n, layer in m.named_modules() if isinstance(layer, nn.LayerNorm)]:
            replace_module(m, name, _Affine(m.get_submodule(name)))
    torch.testing.assert_close(sliced(x), masked(x), atol=1e-4, rtol=1e-4)


class _Affine(nn.Module):
    """A LayerNorm's gain and bias without its statistics."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.weight + self.bias


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_giant_patch14_dinov2"])
def test_count_is_that_of_the_sliced_model(name: str) -> None:
    model = _model(name)
    open_blocks(model)
    structures = vit_structures(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    keep = _random_keep(structures, 3, {"emb", "head", "qk", "v", "mlp"})
    expected = count_elements(shapes, structures, counts_of(keep))
    slice_vit(model, structures, keep)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.randn(1, 3, SIDE, SIDE)).shape == (1, 5)


def test_masks_survive_json() -> None:
    structures = vit_structures(_opened("vit_tiny_patch16_224"))
    keep = _random_keep(structures, 4, {"emb", "head", "mlp"})
    again = decode_keep(encode_keep(keep), structures)
    assert all(torch.equal(keep[s.name], again[s.name]) for s in structures)
    first = keep_first(structures, {"emb": 5})
    assert counts_of(first)["emb"] == 5 and bool(first["emb"][:5].all())


def _opened(name: str) -> nn.Module:
    model = _model(name)
    open_blocks(model)
    return model


def test_unit_sums_by_hand() -> None:
    grid = torch.arange(24.0).view(6, 4)  # rows: 3 heads of width 2
    heads, widths = Region("w", 0, (3, 2), 0), Region("w", 0, (3, 2), 1)
    assert unit_sums({"w": grid}, [heads]).tolist() == [28.0, 92.0, 156.0]
    assert unit_sums({"w": grid}, [widths]).tolist() == [114.0, 162.0]
    assert unit_sums({"w": grid}, [Region("w", 1, (4,))]).tolist() == grid.sum(0).tolist()


def test_structures_of_a_convolutional_network() -> None:
    """The kit knows tensors, not transformers: channels of a convolution with its norm and what reads them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    ).eval()
    nn.init.uniform_(net[1].running_mean)
    tensors = ("1.weight", "1.bias", "1.running_mean", "1.running_var", "0.bias")
    own = tuple(Region(n, 0, (6,)) for n in (*tensors, "0.weight"))
    channels = Structure("0", "channel", (*own, Region("3.weight", 1, (6,))), (Region("0.weight", 0, (6,)),))
    out = tuple(Region(n, 0, (4,)) for n in ("3.weight", "3.bias"))
    second = Structure("3", "channel", (*out, Region("5.weight", 1, (4, 4), 0)), out)
    keep = {"0": torch.tensor([1, 0, 1, 1, 0, 1]).bool(), "3": torch.tensor([0, 1, 1, 1]).bool()}
    masked = copy.deepcopy(net)
    enforce({**dict(masked.named_parameters()), **dict(masked.named_buffers())}, [channels, second], keep)
    cut(net, [channels, second], keep)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(net(x), masked(x))
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels, net[5].in_features) == (4, 4, 4, 12)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(RecipeError, match="did you mean 'head'"):
        vit_structures(_opened("vit_tiny_patch16_224"), ("heads",))
    model = _opened("vit_tiny_patch16_224")
    model.extra = nn.Linear(24, 24)
    with pytest.raises(ModelError, match="'extra.weight'"):
        vit_structures(model)
    assert vit_structures(model, ("mlp", "head"))  # without the embedding the stranger does not matter
    with pytest.raises(ModelError, match="expected one nn.Sequential"):
        open_blocks(timm.create_model("resnet18"))
