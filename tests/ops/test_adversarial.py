"""Adversarial losses and Gram matrices against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from gossamer.core.errors import RecipeError
from gossamer.ops.adversarial import fooling_loss, gram, judging_loss

SCORES = torch.tensor([[2.0, -0.5], [0.5, -3.0]])


def test_closed_forms() -> None:
    real, fake = (lambda kind, r=r: float(judging_loss(SCORES, real=r, kind=kind)) for r in (True, False))
    assert real("lsgan") == pytest.approx((1 + 2.25 + 0.25 + 16) / 4)
    assert fake("lsgan") == pytest.approx((4 + 0.25 + 0.25 + 9) / 4)
    assert real("hinge") == pytest.approx((0 + 1.5 + 0.5 + 4) / 4)
    assert fake("hinge") == pytest.approx((3 + 0.5 + 1.5 + 0) / 4)
    log = lambda s: math.log1p(math.exp(s))  # noqa: E731
    assert real("vanilla") == pytest.approx((log(-2) + log(0.5) + log(-0.5) + log(3)) / 4)
    assert fake("vanilla") == pytest.approx((log(2) + log(-0.5) + log(0.5) + log(-3)) / 4)


def test_a_generator_wants_what_real_pictures_get() -> None:
    for kind in ("lsgan", "vanilla"):
        assert torch.equal(fooling_loss(SCORES, kind), judging_loss(SCORES, real=True, kind=kind))
    assert float(fooling_loss(SCORES, "hinge")) == pytest.approx(0.25)
    low = SCORES.to(torch.bfloat16)
    assert fooling_loss(low, "hinge").dtype == torch.float32


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lsgan'"):
        judging_loss(SCORES, real=True, kind="lsgn")


def test_gram_is_symmetric_and_counts_every_pixel() -> None:
    x = torch.randn(2, 3, 4, 5)
    want = torch.einsum("bchw,bdhw->bcd", x, x) / 60
    assert torch.allclose(gram(x), want, atol=1e-6)
