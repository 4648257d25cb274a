"""Running statistics taken anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.errors import DataError
from gossamer.kits.norm_statistics import reestimate_norms


def test_statistics_are_the_average_over_the_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 2)).train()
    model(torch.randn(8, 3) * 100)
    batches = [torch.randn(16, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert reestimate_norms(model, batches) == 1
    means = torch.stack([b.mean(0) for b in batches]).mean(0)  # dropout stays off
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[1].momentum == 0.3 and all(m.training for m in model.modules())


def test_nothing_to_look_at() -> None:
    with pytest.raises(DataError, match="at least one"):
        reestimate_norms(nn.Sequential(nn.BatchNorm1d(2)), [])
