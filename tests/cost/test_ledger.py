"""The ledger against published counts, hand counts and declared widths."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.cost.ledger import CONVENTION, Cost, cost

GMACS = {
    "deit_tiny_patch16_224": 1.254,
    "deit_small_patch16_224": 4.599,
    "deit_base_patch16_224": 17.564,
    "vit_large_patch16_224": 61.555,
    "vit_huge_patch14_224": 167.296,
    "resnet50": 4.089,
    "swin_tiny_patch4_window7_224": 4.491,
    "crossvit_small_240": 5.616,
    "efficientformer_l1": 1.291,
}
"""Executed MACs in billions at the model's own size: DiffRate tables 1-3, torch's counter elsewhere."""
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 10}


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(("name", "gmacs"), GMACS.items())
def test_published_counts(name: str, gmacs: float) -> None:
    model = on_meta(name)
    got = cost(model, saved=False)
    assert got.macs / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert got.theoretical_macs == got.macs
    assert got.bops == got.macs * 32 * 32
    assert got.params == sum(p.numel() for p in model.parameters())


def test_a_parameter_may_be_the_input_of_a_module() -> None:
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=1, num_classes=10)  # its class token is
    assert cost(model).macs > 0 and all(p.requires_grad for p in model.parameters())


def test_a_vit_by_hand() -> None:
    n, d, depth, heads, classes = 17, 24, 2, 2, 10
    embed = 16 * d * 3 * 64
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    assert d % heads == 0
    got = cost(small_vit())
    assert got.macs == embed + depth * block + d * classes
    assert got.input_shape == (1, 3, 32, 32)
    rows = {row.name: row for row in got.per_layer}
    assert rows["blocks.0.attn"].macs == 2 * n * n * d
    assert rows["blocks.1.mlp.fc1"].macs == n * d * 4 * d
    assert sum(row.macs for row in got.per_layer) == got.macs


def test_counts_are_per_image_and_bytes_per_batch() -> None:
    model = small_vit()
    one, eight = cost(model), cost(model, torch.zeros(8, 3, 32, 32))
    assert one.macs == eight.macs and one.bops == eight.bops
    assert eight.activation_bytes == 8 * one.activation_bytes
    assert eight.peak_activation_bytes == 8 * one.peak_activation_bytes


def test_example_may_be_a_size() -> None:
    net = nn.Conv2d(3, 4, 3)
    assert cost(net, (3, 8, 8)) == cost(net, torch.zeros(1, 3, 8, 8))
    assert cost(net, (2, 3, 8, 8)).input_shape == (2, 3, 8, 8)
    assert cost(timm.create_model("vit_tiny_patch16_224", in_chans=1, **SMALL)).input_shape == (1, 1, 32, 32)


def test_meta_and_real_agree() -> None:
    real = cost(small_vit())
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    meta = cost(model)
    assert (real.macs, real.params, real.weight_bytes) == (meta.macs, meta.params, meta.weight_bytes)


class Product(nn.Module):
    """A product of two activations that declares its widths."""

    def __init__(self) -> None:
        super().__init__()
        self.input_bits, self.weight_bits = 4, 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.transpose(-1, -2)


class Plain(Product):
    """The same, declaring only the width of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        del self.weight_bits


@pytest.mark.parametrize(("product", "bits"), [(Product(), 24), (Plain(), 16)])
def test_bops_of_activation_products_use_both_operands(product: nn.Module, bits: int) -> None:
    got = cost(product, torch.zeros(1, 2, 5, 7))
    assert got.macs == 2 * 5 * 5 * 7
    assert got.bops == got.macs * bits


def test_declared_widths_are_honoured() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    net[0].weight_bits, net[0].input_bits = 4, 8
    got = cost(net, torch.zeros(1, 8))
    assert got.bops == 32 * 4 * 8 + 8 * 32 * 32
    assert got.weight_bytes == 32 // 2 + 4 * 4 + (8 + 2) * 4
    net[1].weight_bytes = 5
    assert cost(net, torch.zeros(1, 8)).weight_bytes == 32 // 2 + 4 * 4 + 5


def test_assumed_widths_are_for_products_that_declare_none() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    net[0].weight_bits, net[0].input_bits = 4, 4
    got = cost(net, torch.zeros(1, 8), bits=(8, 6))
    assert got.bops == 32 * 4 * 4 + 8 * 8 * 6
    assert got.weight_bytes == 32 // 2 + 16 + 8 * 4 + 8 + 8
    assert cost(net, torch.zeros(1, 8), bits=8).bops == 32 * 16 + 8 * 64
    for wrong in (0, (8, 65), (8, 8, 8)):
        with pytest.raises(RecipeError, match="one width or"):
            cost(net, torch.zeros(1, 8), bits=wrong)


def test_half_precision_models_have_16_bits() -> None:
    got = cost(nn.Linear(8, 4).to(torch.bfloat16), torch.zeros(1, 8, dtype=torch.bfloat16))
    assert (got.bops, got.weight_bytes) == (32 * 256, 36 * 2)


def test_shared_parameters_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    got = cost(net, torch.zeros(1, 4))
    assert (got.params, got.weight_bytes, got.macs) == (16, 64, 32)
    twice = nn.Sequential(net[0], nn.ReLU(), net[0])
    assert (cost(twice, torch.zeros(1, 4)).macs, cost(twice, torch.zeros(1, 4)).params) == (32, 16)


def test_quantized_layers_hold_parameters_as_buffers() -> None:
    class Held(nn.Module):
        weight_bits = input_bits = 8
        weight_bytes = 32 + 16

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(4, 8, dtype=torch.int8))
            self.register_buffer("bias", torch.zeros(4))
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)

    got = cost(Held(), torch.zeros(1, 8))
    assert (got.params, got.weight_bytes, got.bops) == (36, 48, 32 * 64)


def test_theoretical_counts_replace_what_was_executed() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    net[1].theoretical_macs = 1000
    got = cost(net, torch.zeros(1, 8))
    assert (got.macs, got.theoretical_macs) == (32 + 16 + 8, 32 + 1000)
    assert {row.name: row.theoretical_macs for row in got.per_layer} == {"0": 32, "1": 1000, "1.0": 0, "1.1": 0}
    net[1][0].theoretical_macs = 7
    assert cost(net, torch.zeros(1, 8)).theoretical_macs == 1032


def test_operators_of_ones_own_join_by_a_formula() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("gossamer_tests::double_sum", mutates_args=())
    def double_sum(x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1) * 2

    @register_flop_formula(torch.ops.gossamer_tests.double_sum)
    def _(x_shape: torch.Size, out_shape: torch.Size, **kwargs: object) -> int:
        return 2 * x_shape.numel()

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.gossamer_tests.double_sum(x)

    try:
        assert cost(Own(), torch.zeros(2, 5), saved=False).macs == 5
    finally:
        del flop_registry[torch.ops.gossamer_tests.double_sum]


def test_activations_of_layers() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Identity(), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2))
    got = cost(net, torch.zeros(3, 8))
    assert got.activation_bytes == 3 * (4 + 2) * 4
    assert got.peak_activation_bytes == 3 * (8 + 4) * 4
    assert got.memory_bytes == got.weight_bytes + got.peak_activation_bytes


def test_activations_of_a_quantized_layer_are_its_own_output() -> None:
    class Quantized(nn.Module):
        weight_bits = input_bits = 8

        def __init__(self) -> None:
            super().__init__()
            self.grid, self.inner = nn.Hardtanh(), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.grid(x)) * 1.0

    got = cost(nn.Sequential(Quantized()), torch.zeros(3, 8))
    assert got.activation_bytes == 3 * 2 * 4


def test_saved_bytes_by_hand() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    got = cost(net, torch.zeros(3, 8))
    assert got.saved_activation_bytes == 3 * (8 + 4) * 4  # the input, and the ReLU's output once for both users
    assert cost(net, torch.zeros(3, 8), saved=False).saved_activation_bytes is None
    for p in net.parameters():
        p.requires_grad_(False)
    assert cost(net, torch.zeros(3, 8)).saved_activation_bytes == 0


def test_recomputation_saves_memory() -> None:
    model = small_vit()
    plain = cost(model).saved_activation_bytes
    model.set_grad_checkpointing(True)
    checkpointed = cost(model).saved_activation_bytes
    assert plain is not None and checkpointed is not None and checkpointed < plain


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    cost(net, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert all(p.grad is None for p in net.parameters())


def test_json_and_metrics() -> None:
    got = cost(small_vit())
    text = got.to_json()
    assert json.loads(json.dumps(text)) == text
    assert set(CONVENTION) <= set(text) and text["convention"] == CONVENTION
    assert [got.metric(m) for m in ("macs", "bops", "params", "size", "memory")] == [
        got.macs,
        got.bops,
        got.params,
        got.weight_bytes,
        got.memory_bytes,
    ]
    with pytest.raises(RecipeError, match="did you mean 'macs'"):
        got.metric("mac")
    assert isinstance(got, Cost)


class Untrainable(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ValueError("not in training")
        return super().forward(x)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ModelError, match="give an example"):
        cost(nn.Linear(8, 4))
    with pytest.raises(ModelError, match=r"\[3, 0, 8\]; allowed are"):
        cost(nn.Conv2d(3, 4, 3), (3, 0, 8))
    with pytest.raises(ModelError, match=r"input \[1, 7\] fails .*pass an example it takes") as caught:
        cost(nn.Linear(8, 4), torch.zeros(1, 7))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="in training; pass a larger batch, or saved=False"):
        cost(Untrainable(8, 4), torch.zeros(1, 8))
