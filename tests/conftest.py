"""Fixtures shared by every test: the optional data folder and small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA_VARIABLE = "GOSSAMER_SHARED_DATA"


def _shared_data() -> Path:
    given = os.environ.get(DATA_VARIABLE)
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights that do not ship with the package; skips where it is absent."""
    folder = _shared_data()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set {DATA_VARIABLE} to run this test")
    return folder


@pytest.fixture(scope="session")
def shared_weights(shared_data: Path) -> Path:
    """Folder of pretrained weights inside ``shared_data``."""
    return shared_data / "weights"
