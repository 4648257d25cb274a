"""Bicubic resizing: properties, the benchmark's own images, patches cut from it."""

from __future__ import annotations

import random
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gossamer.core.errors import DataError
from gossamer.core.schedule import Step
from gossamer.data.images import ImageSource, UnfitPicture, decode
from gossamer.data.loading import StepLoader
from gossamer.data.patches import PatchPair, degrade, to_pixels, to_tensor
from gossamer.data.resize import crop_to_multiple, imresize


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 2.0, 3.0])
def test_constants_stay_and_sides_are_rounded_up(scale: float) -> None:
    out = imresize(np.full((13, 10), 77, np.uint8), scale)
    assert out.shape == (int(np.ceil(13 * scale)), int(np.ceil(10 * scale))) and np.all(out == 77)


def test_known_weights() -> None:
    """Halving: the stretched kernel at distances 0.5, 1.5, 2.5, 3.5 source pixels, by Keys' formula."""
    impulse = np.zeros((1, 16))
    impulse[0, 7] = 1.0
    weights = np.array([0.8671875, 0.2265625, -0.0703125, -0.0234375]) / 2
    np.testing.assert_allclose(imresize(impulse, 0.5)[0, 2:6], weights[[2, 0, 1, 3]], atol=1e-12)


def test_scale_one_is_the_identity_and_ramps_stay_straight() -> None:
    pixels = _noise(9, 7)
    assert np.array_equal(imresize(pixels, 1.0), pixels)
    ramp = np.tile(np.arange(40.0), (8, 1))
    inner = imresize(ramp, 0.5)[2, 3:-3]
    np.testing.assert_allclose(inner, 2 * np.arange(3, 17) + 0.5, atol=1e-9)


def test_borders_are_continued_by_the_edge_or_mirrored() -> None:
    pixels = np.random.default_rng(1).random((12, 12))
    for border, how in (("edge", "edge"), ("mirror", "symmetric")):
        wide = imresize(np.pad(pixels, 8, mode=how), 0.5)[4:-4, 4:-4]  # type: ignore[call-overload]
        np.testing.assert_allclose(imresize(pixels, 0.5, border), wide, atol=1e-12)


def test_refusals() -> None:
    for pixels, scale in ((np.zeros((4, 4), np.int32), 0.5), (np.zeros(4), 0.5), (np.zeros((4, 4)), 0.0)):
        with pytest.raises(DataError, match="expected uint8 or float"):
            imresize(pixels, scale)


def test_the_benchmark_was_made_this_way(shared_data: Path) -> None:
    """The low-resolution images of the public sets, made by MATLAB: equal in every pixel."""
    archive = zipfile.ZipFile(shared_data / "sr_test.zip")
    for scale in (2, 3, 4):
        for name in ("001", "003"):
            low = np.asarray(decode(archive.read(f"Set5/LR_x{scale}/{name}.png")))
            high = np.asarray(decode(archive.read(f"Set5/HR/{name}.png")))
            ours = degrade(high[: low.shape[0] * scale, : low.shape[1] * scale], scale)
            assert np.array_equal(ours, low), (scale, name)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_patch_is_a_part_of_the_degraded_picture(scale: int) -> None:
    pixels = crop_to_multiple(_noise(101, 90), scale)
    whole, image = degrade(pixels, scale), Image.fromarray(pixels)
    random.seed(3)
    for _ in range(20):
        pair = PatchPair(scale, 8, anywhere=True)(image)
        low, high = to_pixels(pair["image"]), to_pixels(pair["target"])
        assert high.shape == (8 * scale, 8 * scale, 3)
        spots = [
            (y, x) for y in range(whole.shape[0] - 7) for x in range(whole.shape[1] - 7)
            if any(np.array_equal(np.rot90(a, k), low) for k in range(4)
                   for a in (whole[y : y + 8, x : x + 8], whole[y : y + 8, x : x + 8][:, ::-1]))
        ]  # fmt: skip
        assert len(spots) == 1
        y, x = (s * scale for s in spots[0])
        cut = pixels[y : y + 8 * scale, x : x + 8 * scale]
        assert any(np.array_equal(np.rot90(a, k), high) for k in range(4) for a in (cut, cut[:, ::-1]))


def test_tensors_keep_pixels() -> None:
    pixels = _noise(5, 6)
    assert np.array_equal(to_pixels(to_tensor(pixels)), pixels)


def test_small_pictures_are_left_out_named_or_continued() -> None:
    small = Image.fromarray(_noise(30, 40))
    with pytest.raises(UnfitPicture, match="40x30 pixels, smaller than a patch of 32x32"):
        PatchPair(2, 16, anywhere=True)(small)
    with pytest.raises(UnfitPicture, match="1x5 pixels, smaller than the scale of 2"):
        PatchPair(2, 16, anywhere=False)(Image.new("RGB", (1, 5)))
    assert PatchPair(2, 16, anywhere=False)(small)["target"].shape == (3, 32, 32)
    large = Image.fromarray(_noise(64, 64))
    source = ImageSource([f"p{i}" for i in range(40)], [0] * 40, lambda i: small if i == 7 else large, what="photos")
    loader = StepLoader(source, PatchPair(2, 16, anywhere=True), 8)
    for i in range(5):
        assert loader(Step("fit", "main", i, 5))["target"].shape == (8, 3, 32, 32)
    assert source.failed == [("p7", "40x30 pixels, smaller than a patch of 32x32; lower the task's patch")]
    with pytest.raises(DataError, match="smaller than a patch"):
        StepLoader(ImageSource(["a"], [0], lambda i: small), PatchPair(2, 16, anywhere=True), 1)(
            Step("fit", "main", 0, 1)
        )


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [("L", 90, (90, 90, 90)), ("LA", (90, 5), (90, 90, 90)), ("RGBA", (10, 20, 30, 7), (10, 20, 30)),
     ("P", 3, None), ("CMYK", (0, 0, 0, 255), (0, 0, 0)), ("I;16", 257 * 90, (90, 90, 90))],
)  # fmt: skip
def test_pictures_of_every_mode_become_rgb(mode: str, value: object, expected: tuple[int, ...] | None) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), value, np.uint16))
    else:
        image = Image.new(mode, (4, 4), value)  # type: ignore[arg-type]
    stream = BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    got = decode(stream.getvalue())
    assert got.mode == "RGB" and (expected is None or got.getpixel((1, 1)) == expected)


def test_floating_point_pictures_are_refused() -> None:
    stream = BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        decode(stream.getvalue())
