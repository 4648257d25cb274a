"""Small picture collections written for one test."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(number: int, side: int = 40) -> Image.Image:
    """Return a picture whose pixels depend on ``number`` alone."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def encoded(number: int, kind: str = "PNG") -> bytes:
    """Return the encoded bytes of ``picture(number)``."""
    out = BytesIO()
    picture(number).save(out, kind)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with classes cat, dog and owl of 8 pictures each."""
    for c, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(encoded(8 * c + i))
    return tmp_path / "photos"
