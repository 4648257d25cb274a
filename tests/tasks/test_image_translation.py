"""Image translation: loss, figures with their network's name, pictures, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.core.schedule import Step
from gossamer.core.stack import Stack
from gossamer.data.images import ImageSource
from gossamer.data.pairs import Pair, pair_sources
from gossamer.kits.example import picture_pairs, tiny_generator
from gossamer.models.fid_inception import FEATURES, fid_inception
from gossamer.models.preprocessing import preprocessing
from gossamer.ops.distances import frechet_distance, moments
from gossamer.recipe import DataSettings
from gossamer.tasks.features import Extractor, distances, diversity, load_extractor
from gossamer.tasks.image_translation import ImageTranslation
from gossamer.tasks.registry import build_task, task_for
from gossamer.tasks.task import in_evaluation


class _Coarse(nn.Module):
    """Mean colours of four quarters."""

    def forward_features(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2)


def coarse() -> Extractor:
    return Extractor(_Coarse(), "coarse", (16, 16), (0.0,), (1.0,))


def photographs(count: int, seed: int) -> ImageSource:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    names = [f"{seed}-{i}" for i in range(count)]
    return ImageSource(names, [0] * count, lambda i: Image.fromarray(pixels[i]), None, f"noise {seed}")


def task(**options) -> ImageTranslation:
    made = ImageTranslation(**options)
    made._loaded = coarse()
    return made


def test_a_generator_says_its_task() -> None:
    pre = preprocessing(tiny_generator())
    assert isinstance(task_for(pre), ImageTranslation)
    assert task_for(pre, {"image_translation": {"paired": False}}).paired is False
    with pytest.raises(RecipeError, match="did you mean 'paired'"):
        build_task("image_translation", {"pared": True})


def test_loss_of_pairs_and_none_without() -> None:
    model, batch = tiny_generator(), picture_pairs(Step("fit", "main", 0, 1))
    out, terms = ImageTranslation(paired=True).loss(model, batch)
    assert torch.allclose(terms["task"], (out - batch["target"]).abs().mean())
    assert ImageTranslation(paired=False).loss(model, batch)[1] == {}
    with pytest.raises(ModelError, match="expected the same"):
        ImageTranslation().loss(model, {**batch, "target": batch["target"][:, :1]})


def test_unpaired_pictures_without_a_method_are_refused() -> None:
    from gossamer.core.errors import PlanError

    step = Step("fit", "main", 0, 1)
    with pytest.raises(PlanError, match="no loss term.*so a method must"):
        Stack().grads(ImageTranslation(paired=False).loss)(tiny_generator(), picture_pairs(step), step, [])


@pytest.mark.filterwarnings("ignore:FID of")
def test_figures_of_pairs() -> None:
    source = pair_sources(photographs(6, 0), photographs(6, 1), paired=True)
    model = tiny_generator()
    scored = task()
    scored.check(source, model)
    assert scored.paired
    pre = preprocessing(model)
    found = scored.evaluate(in_evaluation(model), scored.batches(source, pre, 4))
    batch = next(iter(scored.batches(source, pre, 6)))
    with torch.no_grad():
        out = model.eval()(batch["image"]) / 2 + 0.5
    target, see = batch["target"] / 2 + 0.5, coarse()
    assert found.l1 == pytest.approx(float((out - target).abs().mean()), rel=1e-5)
    want = frechet_distance(moments(see(out)), moments(see(target)))
    assert found.score == pytest.approx(want, rel=1e-4) and found.names == list(source.names)
    plain = found.to_json()
    assert plain["extractor"] == "coarse" and {"fid", "kid", "kid_std", "l1", "diversity"} < plain.keys()
    assert scored.compare(found, found)["feature_cosine"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:FID of")
def test_unpaired_domains_count_every_picture_once() -> None:
    a, b = photographs(7, 0), photographs(4, 1)
    source, scored, model = pair_sources(a, b, paired=False), task(), tiny_generator()
    scored.check(source, model)
    found = scored.evaluate(in_evaluation(model), scored.batches(source, preprocessing(model), 3))
    assert scored.paired is False and found.l1 is None
    assert (found.distances.generated, found.distances.real) == (7, 4) and found.names == list(a.names)


def test_a_single_picture_is_refused_before_the_training() -> None:
    with pytest.raises(DataError, match="1 picture; FID and KID need at least 2"):
        task(paired=True).check(photographs(1, 0), tiny_generator())


def test_few_images_warn() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 8, generator=draw) for _ in range(2))
    with pytest.warns(UserWarning, match="FID of 50 generated and 50 real images with 8 features"):
        distances(x, y, "noise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distances(x.repeat(40, 1), y.repeat(40, 1), "noise")
    with pytest.raises(DataError, match="at least 2 of each"):
        distances(x[:1], y, "noise")


@pytest.mark.parametrize("spec", [None, "", "inception", "resnet18"])
def test_extractor_without_weights_says_how_to_give_them(spec) -> None:
    with pytest.raises(RecipeError, match="inception@pt_inception-2015-12-05.safetensors.*weights_only=True.*stand-in"):
        load_extractor(spec)


def test_missing_or_foreign_weights_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file.*pytorch-fid"):
        load_extractor(f"inception@{tmp_path}/none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="do not fit.*pytorch-fid"):
        load_extractor(f"inception@{tmp_path}/other.safetensors")


def test_the_standard_network_and_its_name(tmp_path: Path) -> None:
    net = fid_inception()
    assert (
        sum(p.numel() for p in net.parameters()) == 23_834_568 - 1000 * 2049 + 1008 * 2049
    )  # torchvision's, 1008 classes
    save_file(net.state_dict(), tmp_path / "i.safetensors")
    extractor = load_extractor(f"inception@{tmp_path}/i.safetensors")
    assert extractor.standard and extractor(torch.rand(1, 3, 32, 32)).shape == (1, FEATURES)
    assert ImageTranslation(extractor="inception@x").metric.name == "FID"


def test_a_stand_in_is_named() -> None:
    extractor = load_extractor("vit_tiny_patch16_224@embedded")
    assert not extractor.standard and extractor(torch.rand(2, 1, 32, 32)).shape == (2, 192)
    metric = ImageTranslation().metric
    assert metric.name == "FID of vit_tiny_patch16_224 features" and not metric.higher


def test_collapse_shows_in_diversity() -> None:
    draw = torch.Generator().manual_seed(0)
    one = torch.rand(1, 16, generator=draw)
    assert diversity(one.expand(5, 16)) == pytest.approx(0, abs=1e-9)
    x = torch.randn(6, 16, generator=draw)
    unit = x / x.norm(dim=1, keepdim=True)
    off = [float(unit[i] @ unit[j]) for i in range(6) for j in range(6) if i != j]
    assert diversity(x) == pytest.approx(1 - sum(off) / 30, rel=1e-5)


def test_views_and_their_options() -> None:
    pre, own = preprocessing(tiny_generator()), task(paired=True)
    view = own.train_view(pre, DataSettings(augment={"load": 1.25, "flip": False}))
    assert view(Pair(Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9))))["target"].shape == (3, 32, 32)
    with pytest.raises(RecipeError, match="did you mean 'flip'"):
        own.train_view(pre, DataSettings(augment={"flips": True}))
    with pytest.raises(RecipeError, match="no labels to mix"):
        own.configure(DataSettings(mixup=0.2))
    with pytest.raises(DataError, match="names no pairs"):
        own.open("npz:some.npz")


def test_gallery_shows_input_stages_and_the_real_one() -> None:
    class Stage:
        title = "dense"

        def model(self) -> nn.Module:
            return tiny_generator()

    pre = preprocessing(tiny_generator())
    source = pair_sources(photographs(8, 0), photographs(8, 1), paired=True)
    groups = task(paired=True).gallery([Stage(), Stage()], source, pre)
    assert len(groups) == 6 and [p["title"] for p in groups[0]["pictures"]] == ["input", "dense", "dense", "real"]
    assert all(p["image"].startswith("data:image/png;base64,") for g in groups for p in g["pictures"])
