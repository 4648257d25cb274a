"""Losses and scores against closed forms."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from gossamer.core.errors import DataError, RecipeError
from gossamer.tasks.classification import Classification, Evaluation, logits_of, predictor


def test_hard_soft_and_smoothed_targets():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    target = torch.tensor([0, 2])
    hard = -logits.log_softmax(1)[[0, 1], target].mean()
    assert torch.isclose(Classification().cross_entropy(logits, target), hard)
    one_hot = torch.eye(3)[target]
    assert torch.isclose(Classification().cross_entropy(logits, one_hot), hard)
    soft = 0.7 * one_hot + 0.3 / 3
    smoothed = Classification(label_smoothing=0.3).cross_entropy(logits, target)
    assert torch.isclose(Classification().cross_entropy(logits, soft), smoothed)
    uniform = Classification().cross_entropy(torch.zeros(4, 10), torch.arange(4))
    assert float(uniform) == pytest.approx(math.log(10))
    with pytest.raises(RecipeError, match="0 <= smoothing < 1"):
        Classification(label_smoothing=1.0)


def test_distilled_model_counts_as_the_mean_of_its_heads():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2, num_classes=4
    )
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([1, 3]), "id": ["a", "b"]}
    model.train()
    model.set_distilled_training(True)
    out, terms = Classification().loss(model, batch)
    assert isinstance(out, tuple) and set(terms) == {"task"}
    assert torch.allclose(logits_of(out), (out[0] + out[1]) / 2)
    assert predictor(model)(batch["image"]).shape == (2, 4) and model.training and model.blocks[0].training


def test_predictor_restores_each_training_flag():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    model[1].eval()
    predictor(model)(torch.ones(1, 2))
    assert model.training and model[0].training and not model[1].training


def test_scores_and_interval():
    logits = torch.arange(10.0).expand(4, 10)  # answers 9, then 8, 7, 6, 5
    result = Evaluation.from_logits(logits, torch.tensor([9, 9, 5, 4]))
    assert (result.top1, result.top5) == (0.5, 0.75)
    # Wilson 1927 for 2 of 4 at z = 1.959964
    z2 = 1.959963984540054**2
    half = math.sqrt(z2 * 0.25 / 4 + z2 * z2 / 64) / (1 + z2 / 4)
    assert result.interval == pytest.approx((0.5 - half, 0.5 + half))


def test_evaluate_takes_arrays_and_refuses_misfits():
    data = [{"image": torch.eye(3), "target": torch.arange(3), "id": ["a", "b", "c"]}]
    assert Classification().evaluate(lambda x: x.numpy(), data).top1 == 1.0
    with pytest.raises(DataError, match="0 images"):
        Classification().evaluate(lambda x: x, [])
    with pytest.raises(DataError, match="targets run from 0 to 2, the model has 2 classes"):
        Classification().evaluate(lambda x: x[:, :2], data)
