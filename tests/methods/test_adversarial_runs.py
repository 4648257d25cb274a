"""Runs of two players, killed after every step: pools, the best teacher and all optimisers come back."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.conformance.protocol import check_resume
from gossamer.kits.example import translation_example
from gossamer.methods.dcd import DCD


class _Coarse(nn.Module):
    """Mean colours of four quarters."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def test_unpaired_cycles_with_pools_and_selection_resume_exactly() -> None:
    see = _Coarse()

    def method() -> DCD:
        return DCD(
            width=2, paired=False, cycles=2, student_ratio=1.0, pool=3, select=see, select_images=4, layers=1, ndf=4,
            lambda_style=0.0, lambda_feature=0.0,
        )  # fmt: skip

    check_resume(translation_example(method, paired=False, steps=2))
