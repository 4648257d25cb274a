"""Routed models: the choice, the grouping, what the ledger counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.cost.ledger import cost
from gossamer.ops.routing import Resized, Routed, deployed, gumbel_noise, route, straight_through
from gossamer.ops.switchable import SwitchableNorm, only_setting, select_norms, shared_copy


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(width, 5),
    )  # fmt: skip


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_gumbel_choices_come_up_with_their_probabilities() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0]])
    noise = gumbel_noise((100_000, 3), torch.Generator().manual_seed(0))
    counts = straight_through(scores.expand(100_000, 3), noise).sum(0)
    expected = 100_000 * F.softmax(scores[0], 0)
    assert float(((counts - expected).square() / expected).sum()) < 13.8  # chi-square, 2 degrees, p = 0.001


def test_the_choice_is_one_hot_forward_and_a_softmax_backward() -> None:
    scores = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    noise, weights = gumbel_noise((7, 4), torch.Generator().manual_seed(2)), torch.randn(7, 4)
    choice = straight_through(scores, noise, 0.5)
    assert torch.equal(choice.detach(), F.one_hot((scores + noise).argmax(1), 4).float())
    (got,) = torch.autograd.grad((choice * weights).sum(), scores)
    (want,) = torch.autograd.grad((F.softmax((scores + noise) / 0.5, 1) * weights).sum(), scores)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(1), torch.zeros(7), rtol=0, atol=1e-6)


def test_noise_is_finite_and_its_generators_own() -> None:
    a, b = (gumbel_noise((1000, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all()


def test_groups_keep_the_order_and_leave_out_what_nobody_takes() -> None:
    seen: list[tuple[int, int]] = []

    def branch(j: int):
        def run(x: Tensor) -> Tensor:
            seen.append((j, len(x)))
            return x.flatten(1)[:, :1] + 100 * j

        return run

    index = torch.tensor([3, 1, 1, 3, 0, 1])
    out = route(images(), index, [branch(j) for j in range(4)])
    torch.testing.assert_close(out, images().flatten(1)[:, :1] + 100 * index[:, None])
    assert seen == [(0, 1), (1, 3), (3, 2)]
    assert route(images(), torch.ones(6, dtype=torch.long), [branch(0), branch(1)]).shape == (6, 1)


def test_gradients_come_back_to_the_images_they_belong_to() -> None:
    x = images().requires_grad_()
    index = torch.tensor([1, 0, 1, 0, 0, 1])
    route(x, index, [lambda v: v.flatten(1).sum(1), lambda v: 2 * v.flatten(1).sum(1)]).sum().backward()
    assert torch.equal(x.grad[:, 0, 0, 0], index + 1.0)


def test_norms_of_one_setting_share_all_other_tensors() -> None:
    model = net()
    model[1] = SwitchableNorm(model[1], (16, 8))
    model[1].versions[1].running_mean.fill_(3.0)
    assert select_norms(model, 8) == [model[1].versions[1]]
    small = only_setting(model.eval(), 8)
    assert isinstance(small[1], nn.BatchNorm2d) and small[1].running_mean is model[1].versions[1].running_mean
    assert small[0] is not model[0] and small[0].weight is model[0].weight
    assert torch.equal(small(images()), model(images()))
    with pytest.raises(ModelError, match="setting 4"):
        only_setting(model, 4)
    again = shared_copy(model)
    assert all(a is b for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_ledger_counts_means_over_the_shares_and_shared_weights_once() -> None:
    big = net()
    small = shared_copy(big)
    router = Resized(net(2), (8, 8))
    model = Routed(router, [Resized(big, (16, 16)), Resized(small, (8, 8))], ["16", "8"], [0.25, 0.75])
    found = cost(model, (3, 16, 16))
    alone = [cost(m, (3, 16, 16)).macs for m in (router, *model.branches)]
    assert found.macs == pytest.approx(alone[0] + 0.25 * alone[1] + 0.75 * alone[2], abs=2)
    assert [(b.name, b.share, b.macs) for b in found.branches] == [("16", 0.25, alone[1]), ("8", 0.75, alone[2])]
    assert found.params == sum(p.numel() for p in big.parameters()) + sum(p.numel() for p in router.parameters())
    assert found.bops == pytest.approx(found.macs * 1024, rel=1e-3)
    assert found.to_json()["branches"][1] == {"name": "8", "share": 0.75, "macs": alone[2]}
    assert found.saved_activation_bytes is None and not model._every and cost(big, (3, 16, 16)).branches == []


def test_a_model_under_training_may_say_what_it_is_in_deployment() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("counted as it trains")

        def deployed(self) -> nn.Module:
            return self.inner.eval()

    model = Training()
    assert deployed(model) is model.inner and deployed(model.inner) is model.inner
    assert cost(model, (3, 16, 16)).macs == cost(model.inner, (3, 16, 16)).macs


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.0], [1.5, -0.5]])
def test_shares_must_be_shares(shares: list[float]) -> None:
    with pytest.raises(ModelError, match="shares that add up to 1"):
        Routed(net(), [net(), net()], ["a", "b"], shares)
    with pytest.raises(ModelError, match="hold one module"):
        Routed(net(), [net()] * 2, ["a", "b"], [0.5, 0.5])
