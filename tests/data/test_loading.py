"""Step batches are a function of (seed, phase, step): whatever the workers, ranks and resumes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.core.errors import DataError, RecipeError
from gossamer.core.schedule import Step
from gossamer.data.loading import Mixing, StepLoader, batches, positions
from gossamer.data.sources import open_data
from gossamer.data.transforms import Rendering, eval_transform, train_transform
from gossamer.models.preprocessing import Preprocessing

PRE = Preprocessing(size=(3, 16, 16))
AUGMENT = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}


def at(index: int, phase: str = "fit", seed: int = 0) -> Step:
    return Step(phase, "main", index, 12, seed=seed)


def loader(folder: Path, **options) -> StepLoader:
    options = {"batch_size": 8, **options}
    return StepLoader(open_data(f"folder:{folder}"), train_transform(PRE, AUGMENT), **options)


def same(a, b) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"]) and a["id"] == b["id"]


def test_batch_depends_on_the_step_alone(folder: Path):
    one, other = loader(folder), loader(folder)
    forward = [one(at(i)) for i in range(5)]
    assert all(same(other(at(i)), forward[i]) for i in (4, 0, 2, 3, 1))
    assert not same(one(at(0, phase="search")), forward[0]) and not same(one(at(0, seed=1)), forward[0])
    assert not same(loader(folder, seed=1)(at(0)), forward[0])


def test_callers_generators_are_left_alone_and_do_not_matter(folder: Path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seeded(value):
        random.seed(value), np.random.seed(value), torch.manual_seed(value)

    seeded(1)
    expected = draws()
    seeded(1)
    a = loader(folder)(at(3))
    assert draws() == expected
    seeded(2)
    assert same(loader(folder)(at(3)), a)


def test_workers_change_nothing(folder: Path):
    plain, many = loader(folder), loader(folder, workers=2)
    for i in (0, 1, 2, 7, 8, 4, 6, 8, 10):  # also jumps, strides and steps back
        assert same(plain(at(i)), many(at(i)))


def test_epochs_are_permutations_without_gaps(folder: Path):
    step = loader(folder, batch_size=9)
    names = [n for i in range(8) for n in step(at(i))["id"]]
    epochs = [names[k : k + 24] for k in (0, 24, 48)]
    assert all(len(set(e)) == 24 for e in epochs) and epochs[0] != epochs[1]
    ordered = loader(folder, shuffle=False)
    assert ordered(at(0))["id"] == ordered(at(3))["id"] == [f"cat/{i}.png" for i in range(8)]


@pytest.mark.parametrize("mixing", [None, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_one_process_batch(folder: Path, world: int, mixing):
    whole = loader(folder, mixing=mixing)
    ranks = [loader(folder, rank=r, world=world, mixing=mixing) for r in range(world)]
    places = [p for r in range(world) for p in positions(8, r, world)]
    assert sorted(places) == list(range(8))
    for i in range(6):
        parts = [r(at(i)) for r in ranks]
        image, target = torch.empty(8, 3, 16, 16), torch.empty_like(whole(at(i))["target"])
        image[places] = torch.cat([p["image"] for p in parts])
        target[places] = torch.cat([p["target"] for p in parts])
        assert torch.equal(image, whole(at(i))["image"]) and torch.equal(target, whole(at(i))["target"])


def test_mixed_targets_are_smoothed_distributions(folder: Path):
    target = loader(folder, mixing=Mixing(mixup=1.0, smoothing=0.3), num_classes=5)(at(0))["target"]
    assert target.shape == (8, 5) and torch.allclose(target.sum(1), torch.ones(8))
    assert float(target.min()) == pytest.approx(0.3 / 5)


def test_broken_picture_is_replaced_by_the_next(folder: Path):
    (folder / "dog" / "3.png").write_bytes(b"broken")
    for workers in (0, 1):
        step = loader(folder, shuffle=False, workers=workers)
        batch = step(at(1))
        assert batch["id"][2:5] == ["dog/2.png", "dog/4.png", "dog/4.png"]
        assert [n for n, _ in step.source.failed] == ["dog/3.png"]
    for i in range(3, 6):
        (folder / "dog" / f"{i}.png").write_bytes(b"broken")
    for workers in (0, 1):
        with pytest.raises(DataError, match="of 24 images cannot be read") as caught:
            loader(folder, shuffle=False, workers=workers)(at(1))
        assert "\n" not in str(caught.value)


def test_bad_settings_are_refused(folder: Path):
    with pytest.raises(RecipeError, match="batch size 8 over 3 processes"):
        loader(folder, world=3)
    with pytest.raises(RecipeError, match="an even number"):
        loader(folder, batch_size=7, mixing={"mixup": 1.0})
    with pytest.raises(RecipeError, match="did you mean 'mixup'"):
        loader(folder, mixing={"mixupp": 1.0})
    with pytest.raises(RecipeError, match="did you mean 'color_jitter'"):
        train_transform(PRE, {"colour_jitter": 0.4})
    with pytest.raises(RecipeError, match="expected at least 1"):
        loader(folder, batch_size=0)


def test_evaluation_sees_every_image_once_in_order(folder: Path):
    source = open_data(f"folder:{folder}")
    for workers in (0, 3):
        got = list(batches(source, eval_transform(PRE), 10, workers=workers))
        assert [len(b["id"]) for b in got] == [10, 10, 4]
        assert [n for b in got for n in b["id"]] == list(source.names)


def test_eval_transform_is_the_documented_one():
    source = open_data("embedded:eval[0:1]")
    pre = Preprocessing(size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    resized = source[0].image.resize((248, 248), 3).crop((12, 12, 236, 236))
    expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(eval_transform(pre)(source[0].image), expected, atol=1e-5)
    grey = Preprocessing(size=(1, 28, 28), mean=(0.5,), std=(0.5,))
    assert eval_transform(grey)(source[0].image).shape == (1, 28, 28)


def by_half(step: Step) -> Rendering:
    return Rendering(size=8, magnitude=0.0, erase=0.0) if step.index < 3 else Rendering(size=12)


def test_rendering_changes_with_the_step(folder: Path):
    plain, many = loader(folder).rendered(by_half), loader(folder, workers=2).rendered(by_half)
    for i in (0, 2, 3, 1, 5):
        batch = plain(at(i))
        assert batch["image"].shape[2:] == ((8, 8) if i < 3 else (12, 12)) and same(batch, many(at(i)))
        assert batch["id"] == loader(folder)(at(i))["id"]


def test_read_ahead_follows_a_changed_mind(folder: Path):
    size = 8
    changing = loader(folder, workers=2).rendered(lambda step: Rendering(size=size))
    assert changing(at(0))["image"].shape[-1] == changing(at(1))["image"].shape[-1] == 8
    size = 12
    for i in (1, 2, 3):
        batch = changing(at(i))
        assert batch["image"].shape[-1] == 12 and same(batch, loader(folder).rendered(lambda s: Rendering(12))(at(i)))


def test_augmentation_is_weakened():
    strong = train_transform(PRE, AUGMENT)

    def parts(**rendering):
        return str(strong.at(Rendering(**rendering)))

    assert "RandAugment" in parts() and "RandAugment" not in parts(magnitude=0.0)
    assert parts(magnitude=1.0) == parts() != parts(magnitude=0.5)
    assert "RandomErasing" not in parts(erase=0.0) and "RandomErasing" in parts(erase=0.5)
    with pytest.raises(RecipeError, match="one size and strength"):
        StepLoader(open_data("embedded:eval[0:2]"), strong.at(Rendering()), 2, rendering=by_half)
