"""SAM as a method: its options, its form on float weights (what it computes is tested with the kit)."""

from __future__ import annotations

import pytest

from gossamer.core.errors import RecipeError
from gossamer.core.stack import Stack
from gossamer.kits.example import tiny_vit
from gossamer.methods.sam import SAM


@pytest.mark.parametrize("bad", [{"rho": -0.1}, {"perturb": ["everything"]}, {"placement": "nowhere"}])
def test_bad_options_are_refused_before_anything_runs(bad) -> None:
    with pytest.raises(RecipeError, match=r"sharpness: .*(allowed|expected)"):
        Stack([SAM(**bad)]).prepare(tiny_vit())
