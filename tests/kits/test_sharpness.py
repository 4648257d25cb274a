"""Two-pass updates: norms, placements, restoring, micro batches, the measure."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.errors import RecipeError
from gossamer.core.schedule import Step
from gossamer.kits import sharpness
from gossamer.kits.sharpness import Ascent, Placement, measure_sharpness, sharp_grads, two_passes
from gossamer.ops.liq import LIQConv2d, LIQLinear

STEP = Step("fit", "main", 0, 1)


def _net(quantized: bool = True) -> nn.Module:
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
    if quantized:
        conv = LIQConv2d(conv, ((3, 3),), normalise=True)
        head = LIQLinear(head, ((8, 8),), inputs="signed")
    return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def _batch(count: int = 8, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return {"image": torch.rand(count, 3, 6, 6, generator=g), "target": torch.randint(4, (count,), generator=g)}


def _loss(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["target"])


def _grads(model, batch, step, params):
    loss = _loss(model, batch)
    loss.backward()
    return {"task": loss.detach()}


def _recorded(monkeypatch) -> list:
    """Let the moves of every ascent be looked at."""
    seen = []
    real = sharpness._ascend

    def spy(spots, ascent):
        moves = real(spots, ascent)
        seen.append([(s, m.clone()) for s, m in moves])
        return moves

    monkeypatch.setattr(sharpness, "_ascend", spy)
    return seen


def _run(model, ascent, batch=None):
    params = list(model.parameters())
    return two_passes(_grads, ascent, model.train(), batch or _batch(), STEP, params)


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("quantized", [True, False])
def test_rho_zero_is_the_plain_gradient_bit_for_bit(placement, quantized) -> None:
    plain, sharp = _net(quantized), _net(quantized)
    _grads(plain.train(), _batch(), STEP, [])
    _run(sharp, Ascent(rho=0.0, placement=placement))
    for (name, a), (_, b) in zip(plain.named_parameters(), sharp.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert sharp_grads(_grads, Ascent(rho=0.0)) is _grads


@pytest.mark.parametrize("placement", list(Placement))
def test_the_perturbation_has_norm_rho_and_is_taken_back(placement, monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net()
    before = copy.deepcopy(model.state_dict())
    kinds = ("weights", "norm", "bias", "act_clip", "weight_clip")
    _run(model, Ascent(rho=0.3, placement=placement, perturb=kinds, norm_updates="both"))
    norm = torch.stack([m.norm() for _, m in seen[0]]).norm()
    assert torch.allclose(norm, torch.tensor(0.3), rtol=1e-5)
    for name, value in model.state_dict().items():
        assert "running" in name or "tracked" in name or torch.equal(value, before[name]), name
    assert all(m.offset is None for m in model.modules() if isinstance(m, LIQConv2d | LIQLinear))


def test_quantized_weights_leave_their_grid_in_the_second_pass() -> None:
    model, seen = _net(), []
    _grads_seen = []

    def spy(model, batch, step, params):
        _grads_seen.append(model[0].operands(batch["image"])[1].detach().clone())
        return _grads(model, batch, step, params)

    two_passes(spy, Ascent(rho=0.2), model.train(), _batch(), STEP, list(model.parameters()))
    first, second = _grads_seen
    assert len(first.unique()) <= 8 and len(second.unique()) > 8 and not seen


def test_perturbation_follows_the_gradient_of_the_quantized_weights(monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net()
    _run(model, Ascent(rho=0.1, perturb=("weights",)))
    reference = _net().train()
    q = [reference[0].quantized_weight().detach().requires_grad_(), reference[5].quantized_weight().detach()]
    q[1].requires_grad_()
    x = _batch()
    out = F.conv2d(reference[0].quantized_input(x["image"]), q[0], reference[0].bias, padding=1)
    out = reference[4](reference[3](reference[2](reference[1](out))))
    F.cross_entropy(F.linear(reference[5].quantized_input(out), q[1], reference[5].bias), x["target"]).backward()
    norm = torch.stack([t.grad.norm() for t in q]).norm()
    for (_, move), t in zip(seen[0], q, strict=True):
        assert torch.allclose(move, 0.1 * t.grad / norm, atol=1e-6)


def test_case_two_at_small_rho_is_swallowed_by_rounding() -> None:
    plain, two, three = _net(), _net(), _net()
    _grads(plain.train(), _batch(), STEP, [])
    _run(two, Ascent(rho=1e-6, placement=Placement.FLOAT, perturb=("weights",)))
    _run(three, Ascent(rho=1e-6, perturb=("weights",)))
    assert torch.allclose(two[0].weight.grad, plain[0].weight.grad, atol=1e-7)
    gaps = [(m[0].weight.grad - plain[0].weight.grad).abs().max() for m in (two, three)]
    assert gaps[0] <= gaps[1]


def test_rise_is_rho_times_the_gradient_norm_to_first_order() -> None:
    model, data, ascent = _net(), [_batch()], Ascent(perturb=("weights",))
    model[5] = LIQLinear(nn.Linear(6, 4), ((3, 32),), inputs="float")  # a rounded input would make the loss jump
    with torch.no_grad():
        model[5].weight.mul_(2)
    rises = {rho: measure_sharpness(model, data, _loss, replace(ascent, rho=rho)).rise for rho in (0.1, 0.02)}
    model.eval()
    with sharpness._offsets(model, ascent):
        _loss(model, data[0]).backward()
        norm = float(torch.stack([m.offset.grad.norm() for m in (model[0], model[5])]).norm())
    errors = [abs(rises[rho] / (rho * norm) - 1) for rho in (0.1, 0.02)]
    assert errors[1] < errors[0] and errors[1] < 0.02


def test_measuring_changes_nothing() -> None:
    model = _net().train()
    model[0].weight.requires_grad_(False)
    before, data = copy.deepcopy(model.state_dict()), [_batch(8, 1), _batch(4, 2)]
    found = measure_sharpness(model, data, _loss, Ascent(rho=0.2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model[0].weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert found.rise > 0
    whole = {k: torch.cat([b[k] for b in data]) for k in data[0]}
    assert found.loss == pytest.approx(_loss(model.eval(), whole).item(), rel=1e-5)
    flat = measure_sharpness(model, data, _loss, Ascent(rho=0.0))
    assert flat.loss == pytest.approx(found.loss) and flat.rise == 0


def test_only_parameters_handed_in_are_perturbed(monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net()
    two_passes(_grads, Ascent(rho=0.1), model.train(), _batch(), STEP, [model[5].bias])
    assert [s.target is model[5].bias for s, _ in seen[0]] == [True]


def test_spared_modules_and_kinds_stay(monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net()
    _run(model, Ascent(rho=0.1, spare=("0",), perturb=("weights", "norm")))
    assert len(seen[0]) == 3  # the head's weights, scale and shift of the norm


def test_ordinary_sam_on_a_float_model(monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net(quantized=False)
    _run(model, Ascent(rho=0.1))
    assert len(seen[0]) == len(list(model.parameters()))
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    by_hand = _net(quantized=False).train()
    _grads(by_hand, _batch(), STEP, [])
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    with torch.no_grad():
        for p in by_hand.parameters():
            p.add_(0.1 * p.grad / norm)
            p.grad = None
    _grads(by_hand, _batch(), STEP, [])
    for name, p in by_hand.named_parameters():
        assert torch.allclose(p.grad, grads[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["asam", "released"])
def test_adaptive_steps(kind: str, monkeypatch) -> None:
    seen, model = _recorded(monkeypatch), _net(quantized=False)
    _run(model, Ascent(rho=0.5, adaptive=kind, eta=0.01, perturb=("weights", "bias")))
    plain = _net(quantized=False).train()
    _grads(plain, _batch(), STEP, [])
    conv, bias = plain[0].weight, plain[0].bias
    t = {id(conv): conv.detach().abs() + 0.01, id(plain[5].weight): plain[5].weight.detach().abs() + 0.01}
    held = [conv, bias, plain[5].weight, plain[5].bias]
    norm = torch.stack([(p.grad * t.get(id(p), 1.0)).norm() for p in held]).norm()
    move = next(m for s, m in seen[0] if m.shape == conv.shape)
    factor = t[id(conv)] if kind == "asam" else conv.detach().abs()
    assert torch.allclose(move, 0.5 * factor.square() * conv.grad / norm, atol=1e-6)
    by_name = next(m for s, m in seen[0] if m.shape == bias.shape)
    assert torch.allclose(by_name, 0.5 * bias.grad / norm, atol=1e-6)


def test_norms_update_once_or_twice() -> None:
    counts = {}
    for updates in ("first", "both"):
        model = _net()
        _run(model, Ascent(rho=0.1, norm_updates=updates))
        counts[updates] = int(model[1].num_batches_tracked)
        assert model[1].track_running_stats
    assert counts == {"first": 1, "both": 2}


def test_micro_batches_give_the_whole_batchs_gradient() -> None:
    def eval_mode(model):
        return model.eval()  # batch statistics would differ between micro batches by their nature

    def in_parts(model, batch, step, params):
        for k in range(2):
            (_loss(model, {n: v[4 * k : 4 * k + 4] for n, v in batch.items()}) / 2).backward()
        return {}

    whole, parts = eval_mode(_net()), eval_mode(_net())
    two_passes(_grads, Ascent(rho=0.2), whole, _batch(), STEP, list(whole.parameters()))
    two_passes(in_parts, Ascent(rho=0.2), parts, _batch(), STEP, list(parts.parameters()))
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


def test_works_under_autocast() -> None:
    def cast(model, batch, step, params):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model, batch)
        loss.backward()
        return {}

    model = _net().train()
    two_passes(cast, Ascent(rho=0.1), model, _batch(), STEP, list(model.parameters()))
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "bad", [{"rho": -1.0}, {"adaptive": "yes"}, {"perturb": ("all",)}, {"perturb": ()}, {"norm_updates": "never"}]
)
def test_bad_values_are_refused(bad) -> None:
    with pytest.raises(RecipeError, match=r"sharpness: .*(allowed|expected)"):
        replace(Ascent(), **bad)
