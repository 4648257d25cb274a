"""Super-resolution: figures as papers report them, tiles, pairs of models, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.data.images import ImageSource
from gossamer.data.patches import to_tensor
from gossamer.data.resize import imresize
from gossamer.data.sources import open_data
from gossamer.models.build import load_model
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.recipe import DataSettings, Recipe
from gossamer.tasks.image_quality import cut_border, luma, psnr, ssim
from gossamer.tasks.registry import build_task, task_for
from gossamer.tasks.super_resolution import SuperResolution
from gossamer.tasks.task import in_evaluation, predict_with
from gossamer.tasks.tiling import enlarge


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _source(*pictures: np.ndarray) -> ImageSource:
    names = [f"p{i}" for i in range(len(pictures))]
    return ImageSource(names, [0] * len(names), lambda i: Image.fromarray(pictures[i]))


def _nearest(scale: int):
    return predict_with(lambda x: torch.nn.functional.interpolate(x, scale_factor=scale, mode="nearest"))


# -- figures ---------------------------------------------------------------------------------------
def test_luma_of_known_colours() -> None:
    row = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(luma(row)[0], [16, 235, 81.481], atol=1e-9)
    assert luma(row, whole=True)[0].tolist() == [16, 235, 81]


def test_psnr_and_ssim_of_known_errors() -> None:
    a = np.full((32, 32), 100.0)
    assert psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5)) and psnr(a, a) == np.inf
    assert ssim(a, a) == pytest.approx(1.0)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, a + 5) == pytest.approx((2 * 100 * 105 + c1) / (100**2 + 105**2 + c1))
    with pytest.raises(DataError, match="one shape"):
        psnr(a, a[:3])
    with pytest.raises(DataError, match="11 x 11"):
        ssim(a[:5], a[:5])
    with pytest.raises(DataError, match="nothing left"):
        cut_border(a, 16)


def test_pictures_too_small_for_figures_are_left_out_and_named() -> None:
    source = _source(*[np.full((24, 24, 3), 90, np.uint8)] * 20, np.zeros((14, 40, 3), np.uint8))
    assert len(list(SuperResolution(scale=2).batches(source, Preprocessing(), 1))) == 20
    assert source.failed == [("p20", "40x14 pixels; figures need at least 15x15")]


def test_only_what_lies_inside_the_border_counts() -> None:
    high = np.full((24, 24, 3), 90, np.uint8)
    task = SuperResolution(scale=2)
    data = list(task.batches(_source(high), Preprocessing(), 1))

    def spoil(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.interpolate(x, scale_factor=2)
        y[..., :2, :] = y[..., -2:] = 0
        return y

    assert task.evaluate(predict_with(spoil), data).psnrs == [np.inf]
    assert np.isfinite(SuperResolution(scale=2, border=1).evaluate(predict_with(spoil), data).score)


@pytest.mark.parametrize(("scale", "expected"), [(2, 33.67), (4, 28.43)])
def test_bicubic_reaches_its_published_figure(shared_data: Path, scale: int, expected: float) -> None:
    """Bicubic interpolation of MATLAB's own low-resolution images, Set5: 33.66 and 28.42 in papers."""
    task = SuperResolution(scale=scale)
    images = task.open(f"zip:{shared_data / 'sr_test.zip'}#Set5/HR")

    def bicubic(x: torch.Tensor) -> torch.Tensor:
        pixels = (255 * x[0]).round().byte().permute(1, 2, 0).numpy()
        return to_tensor(imresize(pixels, float(scale)))[None]

    found = task.evaluate(predict_with(bicubic), task.batches(images, Preprocessing(), 1))
    assert found.score == pytest.approx(expected, abs=0.02) and len(found.names) == 5


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [("srgan_x4", "srresnet5_x4", 30.66), ("imdn_x2", "imdn_x2", 38.00), ("imdn_x4", "imdn_x4", 32.21)],
)
def test_pretrained_networks_reach_their_figures(
    shared_data: Path, shared_weights: Path, name: str, weights: str, expected: float
) -> None:
    model = load_model(f"{name}@{shared_weights / weights}.safetensors")
    task = task_for(preprocessing(model))
    images = task.open(f"zip:{shared_data / 'sr_test.zip'}#Set5/HR")
    task.check(images, model)
    found = task.evaluate(in_evaluation(model), task.batches(images, preprocessing(model), 1))
    assert found.score == pytest.approx(expected, abs=0.015)


def test_two_models_on_the_same_pictures() -> None:
    task = SuperResolution(scale=2)
    data = list(task.batches(_source(_noise(40, 30), _noise(30, 40, 1)), Preprocessing(), 1))
    a, b = task.evaluate(_nearest(2), data), task.evaluate(predict_with(lambda x: x.repeat_interleave(2, 2)
                                                           .repeat_interleave(2, 3) * 0.9), data)  # fmt: skip
    found = task.compare(a, b)
    assert found["difference_db"] == pytest.approx(b.score - a.score) and found["images"] == 2
    low, high = found["interval_db"]
    assert low <= found["difference_db"] <= high and found["psnr_to_reference"] > 15
    same = task.compare(a, a)
    assert same["difference_db"] == 0 and same["psnr_to_reference"] is None


# -- tiles -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(50, 41, 24, 4), (20, 70, 16, 3), (9, 9, 32, 4)])
def test_tiles_of_a_local_network_leave_no_trace(height: int, width: int, tile: int, overlap: int) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2), nn.Sigmoid())
    net = nn.Sequential(*layers)
    pixels = _noise(height, width)
    whole = enlarge(in_evaluation(net), pixels, 2)
    assert np.array_equal(enlarge(in_evaluation(net), pixels, 2, tile=tile, overlap=overlap), whole)
    sizes = []

    def fixed(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape))
        return in_evaluation(net)(x)

    got = enlarge(predict_with(fixed, (3, tile, tile)), pixels, 2, overlap=overlap)
    assert set(sizes) == {(1, 3, tile, tile)} and got.shape == whole.shape
    if min(height, width) >= tile:
        assert np.array_equal(got, whole)


def test_tiles_must_be_larger_than_their_overlaps() -> None:
    with pytest.raises(RecipeError, match="expected at least 33"):
        enlarge(_nearest(2), _noise(64, 64), 2, tile=32, overlap=16)
    with pytest.raises(ModelError, match="scale 3 would be"):
        enlarge(_nearest(2), _noise(8, 8), 3)


# -- choosing --------------------------------------------------------------------------------------
def test_the_model_says_its_task_and_scale() -> None:
    model = load_model("edsr_baseline_x3", depth=1, width=4, img_size=8)
    task = task_for(preprocessing(model))
    assert task == SuperResolution(scale=3)
    assert task_for(preprocessing(model), {"super_resolution": {"patch": 8}}) == SuperResolution(scale=3, patch=8)
    again = Preprocessing.from_json(preprocessing(model).to_json())
    assert again == preprocessing(model) and "task" not in Preprocessing().to_json()


def test_a_scale_the_model_lacks() -> None:
    model = load_model("edsr_baseline_x2", depth=1, width=4, img_size=8)
    with pytest.raises(RecipeError, match="scale 3 was asked for, EDSR enlarges by 2"):
        task_for(preprocessing(model), {"super_resolution": {"scale": 3}}).check(None, model)
    with pytest.raises(RecipeError, match="scale=5; allowed are 2, 3, 4"):
        build_task("super_resolution", {"scale": 5})
    with pytest.raises(RecipeError, match="no scale is known"):
        SuperResolution().check(None, nn.Conv2d(3, 3, 1))


def test_unknown_tasks_and_options() -> None:
    with pytest.raises(RecipeError, match="did you mean 'super_resolution'"):
        build_task("superresolution")
    with pytest.raises(RecipeError, match="did you mean 'patch'"):
        build_task("super_resolution", {"pathc": 3})
    with pytest.raises(RecipeError, match="task super_resolution: patch='x'"):
        build_task("super_resolution", {"patch": "x"})
    with pytest.raises(RecipeError, match="expected one task name"):
        Recipe(model="edsr_baseline_x2", task=["super_resolution"])
    assert Recipe(model="edsr_baseline_x2", task="super_resolution").task == {"super_resolution": {}}
    with pytest.raises(RecipeError, match="mixup"):
        SuperResolution(scale=2).configure(DataSettings(mixup=0.2))


def test_any_folder_of_pictures_serves(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for k, place in enumerate(("a.png", "deep/b.png", "deep/er/c.png")):
        Image.fromarray(_noise(16, 16, k)).save(tmp_path / place)
    assert len(SuperResolution(scale=2).open(f"folder:{tmp_path}")) == 3
    assert len(SuperResolution(scale=2).open(f"folder:{tmp_path}#deep")) == 2
    with pytest.raises(DataError, match="without labels"):
        open_data(f"folder:{tmp_path}#deep/er")


def test_loss_is_in_grey_levels() -> None:
    batch = {"image": torch.zeros(1, 3, 4, 4), "target": torch.full((1, 3, 8, 8), 0.1)}
    net = nn.Upsample(scale_factor=2)
    assert SuperResolution(scale=2).loss(net, batch)[1]["task"].item() == pytest.approx(25.5)
    squared = SuperResolution(scale=2, loss_kind="l2").loss(net, batch)[1]["task"].item()
    assert squared == pytest.approx(25.5**2)
