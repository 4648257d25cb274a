"""The frozen teacher and its taps."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer.core.errors import ModelError, RecipeError, StateError
from gossamer.core.method import Method
from gossamer.core.stack import Stack
from gossamer.kits import teacher as kit
from gossamer.kits.teacher import FeatureTap, FrozenTeacher, bind_self, block_paths, resolve_teacher

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 5}


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", SMALL, ["blocks.0", "blocks.1", "blocks.2"]),
        ("deit_tiny_distilled_patch16_224", SMALL, ["blocks.0", "blocks.1", "blocks.2"]),
        ("cait_xxs24_224", SMALL, ["blocks.0", "blocks.1", "blocks.2"]),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 4, "depths": (1, 2), "embed_dim": 8, "num_heads": (1, 1)},
            ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"],
        ),
    ],
)
def test_blocks_of_every_family_are_found_and_tapped(name, options, expected) -> None:
    model = timm.create_model(name, **options)
    assert block_paths(model) == expected
    side = options["img_size"]
    taught = FrozenTeacher(model)(torch.randn(2, 3, side, side), expected)
    assert list(taught.features) == expected and taught.logits.shape[0] == 2
    assert all(f.shape[0] == 2 and not f.requires_grad for f in taught.features.values())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear.*'blocks'"):
        block_paths(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="blocks.7"):
        FeatureTap(vit(), ["blocks.7"])


def test_tap_hands_out_once_and_keeps_no_graph() -> None:
    model, x = vit().train(), torch.randn(2, 3, 32, 32)
    tap = FeatureTap(model, ["blocks.1"])
    with pytest.raises(StateError, match="recorded nothing"):
        tap.read()
    model(x)
    seen = tap.read()["blocks.1"]
    assert seen.requires_grad and seen.shape == (2, 17, 16)
    with pytest.raises(StateError, match="before each read"):
        tap.read()
    model(x)
    with pytest.raises(StateError, match="not read"):
        model(x)
    tap.clear()
    model(x)
    tap.remove()
    assert not model._forward_hooks and not model.blocks[1]._forward_hooks and not model._forward_pre_hooks


def test_tap_ignores_evaluation_copies_and_recomputation() -> None:
    model, x = vit().train(), torch.randn(2, 3, 32, 32)
    tap = FeatureTap(model, ["blocks.1"])
    model.eval()(x)
    with pytest.raises(StateError, match="in training mode"):
        tap.read()
    twin = copy.deepcopy(model).train()
    twin(x)
    with pytest.raises(StateError, match="recorded nothing"):
        tap.read()
    model.train().set_grad_checkpointing(True)
    model(x)
    tap.read()["blocks.1"].sum().backward()
    with pytest.raises(StateError, match="recorded nothing"):  # the backward pass ran the block again, unseen
        tap.read()


def test_tap_refuses_outputs_without_a_graph() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    x = torch.zeros(1, 2, requires_grad=True)
    with FeatureTap(model := Reentrant(), ["inner"]), pytest.raises(StateError, match="use_reentrant=False"):
        model(x)


def test_tap_refuses_a_module_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(self.inner(x))

    with FeatureTap(model := Twice(), ["inner"]), pytest.raises(StateError, match="ran twice"):
        model(torch.zeros(1, 2))


def test_teacher_stays_in_evaluation_mode_without_hooks() -> None:
    model = vit().train()
    teacher = FrozenTeacher(model)
    x = torch.randn(2, 3, 32, 32)
    first = teacher(x, ["blocks.0"]).logits
    model.train()
    assert torch.equal(teacher(x).logits, first) and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_teacher_resizes_to_the_size_it_insists_on() -> None:
    assert FrozenTeacher(vit())(torch.randn(2, 3, 48, 48)).logits.shape == (2, 5)


def test_teacher_must_return_logits() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ModelError, match="tuple"):
        FrozenTeacher(Pair())(torch.zeros(1, 3, 4, 4))


def test_renormalise_changes_statistics_exactly() -> None:
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    a, b = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    norm = lambda x, s: (x - torch.tensor(s[0]).view(-1, 1, 1)) / torch.tensor(s[1]).view(-1, 1, 1)  # noqa: E731
    assert torch.allclose(kit.Renormalise(a, b)(norm(pixels, a)), norm(pixels, b), atol=1e-6)


class _Learner(Method):
    """A toy that takes a teacher."""

    def __init__(self, teacher) -> None:
        self.teacher = teacher
        self.bound: nn.Module | None = None

    def bind(self, dense: nn.Module) -> None:
        self.bound = dense


def test_bind_self_copies_the_dense_model_once_and_freezes_it() -> None:
    model = vit().train()
    learners = [_Learner("self"), _Learner("self"), _Learner(vit(1))]
    bind_self(Stack([*learners, Method()]), model)
    assert learners[0].bound is learners[1].bound and learners[2].bound is None
    twin = learners[0].bound
    assert twin is not model and not twin.training and model.training
    assert not any(p.requires_grad for p in twin.parameters()) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.cls_token.add_(1)
    assert not torch.equal(twin.cls_token, model.cls_token)


def test_specs_are_resolved_or_refused() -> None:
    model = vit()
    assert resolve_teacher(model).model is model
    with pytest.raises(RecipeError, match="bind_self"):
        resolve_teacher("self")
    with pytest.raises(RecipeError, match="expected a model, 'self'"):
        resolve_teacher(3)
