"""Networks for 32 x 32 images: shapes, registration, published bit operations."""

from __future__ import annotations

import pytest
import torch

from gossamer.cost.ledger import cost
from gossamer.models.build import load_model
from gossamer.models.source import source_of


@pytest.mark.parametrize(
    ("name", "classes", "bops"),
    [
        ("preact_resnet20", 100, 41_798_598_656),
        ("preact_resnet56", 100, 128_771_686_400),
        ("mobilenetv2_cifar", 100, 93_460_627_456),
    ],
)
def test_float_bit_operations_are_the_published_ones(name: str, classes: int, bops: int) -> None:
    assert cost(load_model(name, num_classes=classes), saved=False).bops == bops


@pytest.mark.parametrize(
    ("name", "params", "macs"), [("resnet20_cifar", 272_464, 40_813_184), ("resnet32_cifar", 466_896, 69_124_736)]
)
def test_plain_resnets_have_the_published_sizes(name: str, params: int, macs: int) -> None:
    found = cost(load_model(name, num_classes=10, head_bias=False), saved=False)
    assert (found.params, found.macs) == (params, macs)


def test_networks_are_timm_models() -> None:
    model = load_model("preact_resnet8", num_classes=7, width=8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7) and source_of(model).kwargs == {"width": 8}
    assert model.gossamer_source.preprocessing.size == (3, 32, 32) and model.get_classifier() is model.fc


def test_a_narrow_mobilenet_is_built_from_its_stages() -> None:
    stages = [[1, 8, 1, 1], [4, 12, 2, 2]]
    model = load_model("mobilenetv2_cifar", num_classes=10, stages=stages, stem=[8, 2], head=24)
    assert [b.conv3.out_channels for b in model.layers] == [8, 12, 12] and model.fc.in_features == 24
    assert cost(model, saved=False).per_layer[0].macs == 3 * 9 * 8 * 16 * 16
    assert source_of(model).kwargs == {"stages": stages, "stem": [8, 2], "head": 24}
