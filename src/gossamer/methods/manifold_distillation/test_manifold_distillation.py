"""Mathematics and hooks of manifold distillation, without the engine."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import replace
from importlib import resources

import pytest
import timm
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.method import Method
from gossamer.core.registry import build
from gossamer.core.schedule import Phase, Step, Turn
from gossamer.core.stack import Stack
from gossamer.kits.teacher import bind_self
from gossamer.methods.manifold_distillation import ManifoldDistillation, maths
from gossamer.ops.tokens import TokenTrack

FIGURES = {
    f["name"]: f
    for f in tomllib.loads(
        resources.files("gossamer.methods.manifold_distillation").joinpath("figures.toml").read_text()
    )["figure"]
}
STEP = Step("fit", "main", 0, 4)
SMALL = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 10}


def close(value: Tensor | float, name: str) -> None:
    figure = FIGURES[name]
    assert abs(float(value) - figure["value"]) <= figure["tolerance"], (float(value), figure)


def rnd(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **options})


def batch(n: int = 3, seed: int = 5, size: int = 32) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(n, 3, size, size, generator=g),
        "target": torch.arange(n),
        "id": [str(i) for i in range(n)],
    }


def terms_of(method: Method, model: nn.Module, data: dict, step: Step = STEP) -> dict[str, Tensor]:
    model = method.apply(model, edit) if (edit := method.prepare(model)) is not None else model
    model.train()
    return method.loss(model, data, model(data["image"]), step)


def values_of(method: Method, model: nn.Module, data: dict) -> dict[str, float]:
    return {k: v.item() for k, v in terms_of(method, model, data).items()}


def all_terms(s: Tensor, t: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
    s, t = maths.unit_tokens(s), maths.unit_tokens(t)
    index = torch.arange(s.shape[0] * s.shape[1]) if index is None else index
    return {
        "intra": maths.intra_loss(s, t),
        "inter": maths.inter_loss(s, t),
        "random": maths.random_loss(s, t, index),
    }


# -- oracle -------------------------------------------------------------------------------------------


def test_terms_match_the_release() -> None:
    s, t = rnd(1, 4, 49, 32), rnd(2, 4, 49, 48)
    got = all_terms(s, t)
    close(got["intra"], "oracle_intra")
    close(got["inter"], "oracle_inter")
    close(got["random"], "oracle_random_full")
    close(all_terms(s.float(), t.float())["intra"], "oracle_intra_fp32")


def test_lists_of_blocks_match_the_release() -> None:
    sums = {"intra": [], "inter": [], "random": []}
    for i, j in enumerate((0, 1, 4, 5)):
        got = all_terms(rnd(10 + i, 2, 18, 6)[:, 2:], rnd(20 + j, 2, 16, 10))
        for name, weight in (("intra", 4.0), ("inter", 0.1), ("random", 0.2)):
            sums[name].append(weight * got[name])
    for name, values in sums.items():
        close(torch.stack(values).mean(), f"oracle_list_{name}")


def test_merging_matches_the_release() -> None:
    x = torch.arange(2 * 3136 * 2, dtype=torch.float64).reshape(2, 3136, 2)
    y, grid = maths.merge_patches(x, (56, 56), 196)
    assert y.shape == (2, 196, 32) and grid == (14, 14)
    close((y * torch.arange(1, y.numel() + 1, dtype=torch.float64).reshape(y.shape)).sum(), "oracle_merge_checksum")
    intra, inter = [], []
    for i in range(2):
        pair = (maths.merge_patches(rnd(k + i, 2, 3136, c), (56, 56), 196)[0] for k, c in ((30, 3), (40, 5)))
        got = all_terms(*pair)
        intra.append(got["intra"])
        inter.append(got["inter"])
    close(torch.stack(intra).mean(), "oracle_merged_intra")
    close(torch.stack(inter).mean(), "oracle_merged_inter")


def test_logit_terms_match_the_release() -> None:
    student, teacher, labels = rnd(51, 4, 10), rnd(50, 4, 10), torch.tensor([1, 2, 3, 4])
    close(0.3 * maths.soft_loss(student, teacher, 1.0), "oracle_soft_tau1")
    close(0.3 * maths.soft_loss(student, teacher, 3.0), "oracle_soft_tau3")
    close(0.3 * maths.hard_loss(student, teacher), "oracle_hard")
    close(0.7 * torch.nn.functional.cross_entropy(student, labels), "oracle_label")


# -- properties (sheet, b) ----------------------------------------------------------------------------


def test_zero_for_isometries_and_invariant_to_token_scale() -> None:
    s, t = rnd(1, 3, 9, 8), rnd(2, 3, 9, 12)
    q = torch.linalg.qr(rnd(3, 12, 12)).Q
    for value in all_terms(s, s @ q[:8]).values():  # an isometry into a wider space
        assert value < 1e-28
    scale = torch.rand(3, 9, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
    for name, value in all_terms(s, t).items():
        assert torch.allclose(all_terms(s * scale, t @ q)[name], value, atol=1e-14)
        assert 0 <= value <= 4


def test_terms_are_parts_of_the_full_matrix() -> None:
    b, n = 3, 9
    s, t = maths.unit_tokens(rnd(1, b, n, 8)), maths.unit_tokens(rnd(2, b, n, 12))
    a, c = s.flatten(0, 1), t.flatten(0, 1)
    full = (a @ a.mT - c @ c.mT).square().reshape(b, n, b, n)
    got = all_terms(s, t)
    assert torch.allclose(got["random"], full.mean())
    assert torch.allclose(got["intra"], torch.stack([full[i, :, i] for i in range(b)]).mean())
    assert torch.allclose(got["inter"], torch.stack([full[:, i, :, i] for i in range(n)]).mean())
    diagonal = torch.diagonal(full.reshape(b * n, b * n))
    assert diagonal.abs().max() < 1e-28


def test_gradient_is_tangential_and_stays_off_the_teacher() -> None:
    s, t = rnd(1, 3, 9, 8).requires_grad_(), rnd(2, 3, 9, 12)
    sum(all_terms(s, t).values()).backward()
    assert (s.grad * s).sum(-1).abs().max() < 1e-16
    other, x = rnd(7, 2, 4, 5), rnd(6, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sum(all_terms(v, other).values()), (x,))


def test_degenerate_and_permuted_batches() -> None:
    assert all_terms(rnd(1, 1, 9, 8), rnd(2, 1, 9, 12))["inter"] < 1e-28
    assert all_terms(rnd(1, 5, 1, 8), rnd(2, 5, 1, 12))["intra"] < 1e-28
    s, t = rnd(1, 4, 9, 8), rnd(2, 4, 9, 12)
    images, patches = torch.randperm(4), torch.randperm(9)
    for name in ("intra", "inter"):
        moved = all_terms(s[images][:, patches], t[images][:, patches])[name]
        assert torch.allclose(moved, all_terms(s, t)[name], atol=1e-14)


def test_noise_floor_of_independent_features() -> None:
    close(all_terms(rnd(1, 4, 64, 192), rnd(2, 4, 64, 384))["intra"] * 64 / 63, "noise_floor_192_384")


def test_differences_are_squared_in_fp32_under_autocast() -> None:
    s = maths.unit_tokens(torch.randn(2, 16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert maths.gram_distance(s, s.roll(1, 1)).dtype == torch.float32
    tiny = torch.full((1, 2, 2), 1e-4, dtype=torch.float16)
    assert maths._wide(tiny).square().mean() > 0


# -- token bookkeeping ----------------------------------------------------------------------------------


def test_patch_tokens_drop_prefixes_on_each_side() -> None:
    x = torch.arange(18.0).reshape(1, 18, 1)
    assert maths.patch_tokens(x[:, :17], 1, (4, 4))[0][0, 0, 0] == 1
    assert maths.patch_tokens(x, 2, (4, 4))[0][0, 0, 0] == 2
    assert maths.patch_tokens(x[:, :16], 1, (4, 4))[0].shape[1] == 16  # CaiT: blocks carry patches only
    tokens, grid = maths.patch_tokens(torch.zeros(2, 8, 4, 5), 0, None)
    assert tokens.shape == (2, 32, 5) and grid == (8, 4)
    with pytest.raises(ModelError, match="expected \\[B, N, C\\]"):
        maths.patch_tokens(torch.zeros(2, 3), 0, None)


def test_merging_refuses_grids_it_cannot_divide() -> None:
    with pytest.raises(ModelError, match="raise max_tokens"):
        maths.merge_patches(torch.zeros(1, 37 * 37, 2), (37, 37), 196)
    x = torch.zeros(1, 16, 2)
    assert maths.merge_patches(x, (4, 4), 16)[0] is x
    assert maths.merge_patches(torch.zeros(1, 576, 2), (24, 24), 196)[1] == (12, 12)


def test_carry_gathers_pruned_and_averages_merged() -> None:
    t = rnd(1, 2, 4, 3)
    source = torch.zeros(2, 3, 5, dtype=torch.float64)
    source[:, 0, 0] = 1  # class token
    source[:, 1, 3] = 1  # patch 2 alone
    source[:, 2, 1] = source[:, 2, 4] = 1  # patches 0 and 3 merged; patch 1 pruned
    got = maths.carry(source, t, 1)
    assert torch.equal(got[:, 0], t[:, 2])
    assert torch.allclose(got[:, 1], (t[:, 0] + t[:, 3]) / 2)
    with pytest.raises(ModelError, match="patch grid"):
        maths.carry(source, rnd(1, 2, 9, 3), 1)


class _Halving(nn.Module):
    """A block that drops every other patch of what it computes, if told to, and keeps the record."""

    def __init__(self, block: nn.Module, track: TokenTrack, position: int, halve: bool) -> None:
        super().__init__()
        self.block, self.track, self.position, self.halve = block, track, position, halve

    def forward(self, x: Tensor) -> Tensor:
        if self.position == 0:
            self.track.begin(x)
        x, source = self.block(x), self.track.source[self.position]
        if self.halve:
            keep = torch.cat((torch.tensor([0]), torch.arange(1, x.shape[1], 2)))
            x, source = x[:, keep], source[:, keep]
        self.track.source[self.position + 1] = source
        return x


def halving(model: nn.Module, at: int) -> nn.Module:
    track = TokenTrack(len(model.blocks))
    model.blocks = nn.Sequential(*(_Halving(b, track, i, i == at) for i, b in enumerate(model.blocks)))
    return model


def test_teacher_follows_a_student_that_loses_tokens() -> None:
    teacher, manifold = vit(), ("distil_intra", "distil_inter", "distil_random")
    # tokens drop out at the end of the last block: what is left equals the teacher's tokens there
    terms = values_of(ManifoldDistillation(teacher, pairs=[(3, 3)], w_inter=1.0), halving(vit(), at=3), batch())
    assert all(terms[n] < 1e-10 for n in manifold)
    # they drop out earlier: the other tokens change, and the teacher's are matched one to one
    terms = values_of(ManifoldDistillation(teacher, pairs=[(3, 3)]), student := halving(vit(), at=1), batch())
    assert student.blocks[0].track.trace and 1e-8 < terms["distil_intra"] < 1e-2
    wrong = ManifoldDistillation(teacher, pairs=[("blocks.3.block", 3)])
    with pytest.raises(ModelError, match="blocks.0 to blocks.3"):
        terms_of(wrong, halving(vit(), at=1), batch())


def test_stack_needs_the_record_of_reduced_tokens() -> None:
    class Drops(Method):
        stage, touches = "tokens", frozenset({"tokens"})

    class Tells(Drops):
        gives = frozenset({"token_source"})

    with pytest.raises(PlanError, match="token_source"):
        Stack([Drops(), ManifoldDistillation()])
    assert len(Stack([Tells(), ManifoldDistillation()]).methods) == 2


# -- hooks ----------------------------------------------------------------------------------------------


def test_equal_models_have_no_loss_and_labels_are_off_by_default() -> None:
    model = vit()
    stack = Stack([method := ManifoldDistillation()])
    bind_self(stack, model)
    terms = values_of(method, model, batch())
    assert sorted(terms) == ["distil_inter", "distil_intra", "distil_logits", "distil_random", "task"]
    assert all(abs(v) < 1e-6 for v in terms.values())


def test_terms_switch_off_one_by_one() -> None:
    teacher, data = vit(1), batch()
    assert terms_of(ManifoldDistillation(teacher, alpha=0.0, beta=0.0), vit(), data) == {}
    assert set(terms_of(ManifoldDistillation(teacher, beta=0.0), vit(), data)) == {"task", "distil_logits"}
    only = terms_of(ManifoldDistillation(teacher, alpha=0.0, w_inter=0.0, w_random=0.0), vit(), data)
    assert set(only) == {"distil_intra"}
    hard = terms_of(ManifoldDistillation(teacher, beta=0.0, hard=True), vit(), data)["distil_logits"]
    choice = teacher.eval()(data["image"]).argmax(1)
    assert torch.allclose(hard, torch.nn.functional.cross_entropy(vit()(data["image"]), choice))


def test_label_share_takes_soft_labels() -> None:
    data = batch()
    soft = {**data, "target": torch.nn.functional.one_hot(data["target"], 10).float()}
    half = [terms_of(ManifoldDistillation(vit(1), alpha=0.5, beta=0.0), vit(), d)["task"] for d in (data, soft)]
    assert torch.allclose(*half) and torch.allclose(
        half[0], 0.5 * torch.nn.functional.cross_entropy(vit()(data["image"]), data["target"])
    )


def test_no_gradient_reaches_the_teacher_and_no_graph_is_kept() -> None:
    teacher, model = vit(1), vit()
    method = ManifoldDistillation(teacher)
    terms = terms_of(method, model, batch())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert method._tap is not None and not method._tap._seen


def test_checkpointed_and_autocast_students_get_the_same_gradients() -> None:
    def gradient(*, checkpointed: bool = False, low: bool = False) -> Tensor:
        model = vit()
        model.set_grad_checkpointing(checkpointed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            terms = terms_of(ManifoldDistillation(vit(1)), model, batch())
        assert all(v.dtype == torch.float32 for v in terms.values())
        sum(terms.values()).backward()
        return model.blocks[1].attn.qkv.weight.grad

    plain = gradient()
    assert torch.equal(gradient(checkpointed=True), plain)
    assert (gradient(low=True) - plain).abs().max() < 0.03 * plain.abs().max()


def test_random_draw_depends_on_step_and_is_shared() -> None:
    teacher, data = vit(1), batch()
    method = ManifoldDistillation(teacher, k=8)
    model = vit()
    first = terms_of(method, model, data)["distil_random"]
    again = method.loss(model, data, model(data["image"]), STEP)["distil_random"]
    later = method.loss(model, data, model(data["image"]), Step("fit", "main", 1, 4))["distil_random"]
    assert torch.equal(first, again) and not torch.equal(first, later)
    same = terms_of(ManifoldDistillation(copy.deepcopy(vit()), k=8), vit(), data)["distil_random"]
    assert same.item() < 1e-10  # independent draws would leave a floor of about 1/d + 1/D


def test_distils_only_in_turns_that_train_weights() -> None:
    model, data = vit(), batch()
    stack = Stack([method := ManifoldDistillation(vit(1))])
    model = stack.prepare(model)
    search = Phase("toy.search", 2, (Turn(trains=("arch",)),))
    stack.enter(model, search)
    model.train()
    assert method.loss(model, data, model(data["image"]), Step("toy.search", "main", 0, 2)) == {}
    assert len(model.blocks[0]._forward_hooks) == 0  # nothing is even recorded
    stack.enter(model, Phase("fit", 2))
    assert method.loss(model, data, model(data["image"]), STEP)["distil_intra"] > 0
    model = stack.finish(model)
    assert not any(m._forward_hooks for m in model.modules())
    # a resumed run replays the log and stands where the first one stood
    again = Stack([other := ManifoldDistillation(vit(1))])
    replayed = again.replay(vit(), stack.edits[:-1]).train()
    assert other.loss(replayed, data, replayed(data["image"]), STEP)["distil_intra"] > 0


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        (("deit_tiny_patch16_224", {}), ("cait_xxs24_224", {"depth": 5}), 32),
        (("vit_tiny_patch16_224", {"reg_tokens": 4}), ("deit_tiny_distilled_patch16_224", {"embed_dim": 32}), 32),
        (("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}), ("vit_tiny_patch16_224", {}), 32),
    ],
)
def test_pairs_of_families_with_different_prefixes(student, teacher, size) -> None:
    method = ManifoldDistillation(vit(1, teacher[0], **teacher[1]))
    terms = terms_of(method, vit(0, student[0], **student[1]), batch(size=size))
    assert all(torch.isfinite(v) for v in terms.values()) and terms["distil_intra"] > 0


def test_swin_pairs_merge_large_grids() -> None:
    options = {"img_size": 64, "window_size": 4, "embed_dim": 16, "num_heads": (1, 1, 2, 2), "num_classes": 10}
    torch.manual_seed(0)
    student = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), **options)
    teacher = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 3, 1), **options)
    method = ManifoldDistillation(teacher, max_tokens=64)
    terms = terms_of(method, student, batch(size=64))
    assert terms["distil_intra"] > 0
    paths = [p for p, _ in method._plan["pairs"]]
    assert paths == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0"]


def test_distilled_student_learns_with_both_heads() -> None:
    data = batch()
    with pytest.raises(RecipeError, match="alpha=0.5"):
        terms_of(ManifoldDistillation(vit(1)), vit(0, "deit_tiny_distilled_patch16_224"), data)
    model, teacher = vit(0, "deit_tiny_distilled_patch16_224"), vit(1)
    terms = terms_of(ManifoldDistillation(teacher, alpha=0.5, beta=0.0), model, data)
    model.set_distilled_training(True)
    cls, dist = model(data["image"])
    assert torch.allclose(terms["task"], 0.5 * torch.nn.functional.cross_entropy(cls, data["target"]), atol=1e-6)
    assert torch.allclose(
        terms["distil_logits"], 0.5 * maths.soft_loss(dist, teacher.eval()(data["image"]), 1.0), atol=1e-6
    )


# -- refusals --------------------------------------------------------------------------------------------


def test_grids_that_differ_are_refused() -> None:
    with pytest.raises(ModelError, match="student has \\(4, 4\\) patches, the teacher \\(8, 8\\)"):
        terms_of(ManifoldDistillation(vit(1, patch_size=4)), vit(), batch())
    cnn = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=10)
    with pytest.raises(ModelError, match="NHWC"):
        terms_of(ManifoldDistillation(cnn), vit(), batch())
    assert "distil_logits" in terms_of(ManifoldDistillation(cnn, beta=0.0), vit(), batch())


def test_teacher_must_be_another_model_with_the_same_classes() -> None:
    model = vit()
    with pytest.raises(ModelError, match="share"):
        terms_of(ManifoldDistillation(model), model, batch())
    with pytest.raises(ModelError, match="7 classes, the student 10"):
        terms_of(ManifoldDistillation(vit(1, num_classes=7)), model, batch())
    with pytest.raises(RecipeError, match="bind_self"):
        terms_of(ManifoldDistillation(), model, batch())


@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.5}, {"tau": 0.0}, {"k": 1}, {"w_intra": -1.0}, {"max_tokens": 2}, {"token_filter": "patches"},
     {"pairs": []}, {"pairs": [(0, 9)]}, {"beta": -0.5}, {"label_smoothing": 2.0}],
)  # fmt: skip
def test_wrong_values_are_named(options) -> None:
    name = next(iter(options))
    with pytest.raises(RecipeError, match=name):
        terms_of(ManifoldDistillation(vit(1), **options), vit(), batch())


def test_options_come_from_plain_json() -> None:
    method = build("manifold_distillation", {"teacher": "self", "pairs": [[0, 1], ["blocks.2", 3]], "max_tokens": None})
    bind_self(Stack([method]), vit(1))
    model = vit()
    assert method.prepare(model)["pairs"] == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]
    with pytest.raises(RecipeError, match="w_intra"):
        build("manifold_distillation", {"w_intera": 1})


def test_student_is_unchanged() -> None:
    student = timm.create_model("deit_tiny_patch16_224")
    stack = Stack([ManifoldDistillation(vit(1, num_classes=1000))])
    student = stack.finish(stack.prepare(student))
    assert sum(p.numel() for p in student.parameters()) == FIGURES["deit_tiny_params"]["value"]
    assert stack.lasting_edits() == []


def test_what_is_not_whole_or_not_yet_its_own_teacher_trains_without() -> None:
    def turns(method: ManifoldDistillation, phase: Phase) -> list[str]:
        bind_self(Stack([method]), vit(1))
        model = vit()
        method.apply(model, method.prepare(model))
        return method.enter(model, phase)["turns"]["names"]

    fit, first = Phase("fit", 4), Phase("pretrain", 4)
    assert turns(ManifoldDistillation(), fit) == turns(ManifoldDistillation(vit(1)), first) == ["main"]
    assert turns(ManifoldDistillation(), first) == turns(ManifoldDistillation(), first.part("pretrain.a", 0, 2)) == []
    assert turns(ManifoldDistillation(), replace(fit, growing=True)) == []
