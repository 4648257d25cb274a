"""Vision transformers of given widths, and the redistribution rule."""

from __future__ import annotations

import pytest
import timm
import torch

from gossamer.core.errors import ModelError
from gossamer.cost.ledger import cost
from gossamer.models.build import load_model
from gossamer.models.store import load, save
from gossamer.models.widths import ViTWidths, build_vit, redistribute, widths_of

# computed from the formula of the dimensions; lists as the released revit_scratch.py makes them
RELEASED = {
    176: ((10, 2, 2, *[4] * 6, 2, 2, 10), (16, 8, 8, *[16] * 6, 8, 8, 16), 5_339_136, 1.1353e9),
    384: ((10, 4, 4, *[8] * 6, 4, 4, 10), (32, 16, 16, *[32] * 6, 16, 16, 32), 23_123_280, 4.7052e9),
}


@pytest.mark.parametrize("embed", RELEASED)
def test_redistribution_as_released(embed: int) -> None:
    heads, qk, params, macs = RELEASED[embed]
    widths = redistribute(embed)
    assert (widths.heads, widths.qk, widths.v) == (heads, qk, (64,) * 12)
    assert widths.mlp == (*[3 * embed] * 3, *[6 * embed] * 6, *[3 * embed] * 3)
    name = {176: "revit_tiny_distilled_patch16_224", 384: "revit_small_distilled_patch16_224"}[embed]
    with torch.device("meta"):
        model = timm.create_model(name)
        counted = cost(model, saved=False)
    assert counted.params == params
    assert counted.macs == pytest.approx(macs, rel=1e-3)
    assert widths_of(model) == widths


def test_widths_go_through_json_and_name_what_is_wrong() -> None:
    widths = ViTWidths(16, (1, 2), (4, 4), (8, 4), (32, 16))
    assert ViTWidths.from_json(widths.to_json()) == widths
    assert ViTWidths.from_json({"embed": 16, "heads": [1, 2], "qk": 4, "v": 8, "mlp": 32}).qk == (4, 4)
    assert widths.points()[1] == {"embed": 16, "heads": 2, "qk": 4, "v": 4, "mlp": 16}
    for wrong in ({"embed": 16}, {**widths.to_json(), "mlp": [32]}, {**widths.to_json(), "v": 0}):
        with pytest.raises(ModelError, match="widths"):
            ViTWidths.from_json(wrong)
    with pytest.raises(ModelError, match="embed=64"):
        redistribute(64)
    with pytest.raises(ModelError, match="'num_heads'"):
        build_vit(widths, num_heads=3)


def test_a_model_of_widths_saves_and_loads(tmp_path) -> None:
    widths = {"embed": 16, "heads": [1, 2], "qk": [4, 8], "v": 8, "mlp": [24, 16]}
    model = load_model("hetero_vit_distilled_patch16_224", num_classes=3, widths=widths, img_size=32, patch_size=16)
    x = torch.randn(2, 3, 32, 32)
    again = load(save(model, tmp_path / "model"))
    assert torch.equal(again(x), model(x))
    assert widths_of(again) == ViTWidths.from_json(widths)
