"""Pictures of two domains: every layout gives the same pairs; draws repeat; what does not match is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.core.errors import DataError, RecipeError
from gossamer.core.schedule import Step
from gossamer.data.loading import StepLoader, batches
from gossamer.data.pairs import UNPAIRED, Pair, PairTransform, is_paired, open_pairs, pair_sources, serial
from gossamer.data.sources import open_data, take
from gossamer.models.preprocessing import Preprocessing

PRE = Preprocessing(size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """TrainA and trainB with 5 and 3 pictures."""
    for name, count in (("trainA", 5), ("trainB", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(i if name == "trainA" else 10 + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_real_pairs_in_all_layouts_are_the_same(shared_data: Path, tmp_path: Path) -> None:
    archive = zipfile.ZipFile(shared_data / "label2photo_cocostuff.zip")
    names = sorted({Path(n).stem for n in archive.namelist() if n.startswith("val/") and n.endswith(".jpg")})
    for folder in ("side/val", "two/valA", "two/valB"):
        (tmp_path / folder).mkdir(parents=True)
    for name in names:
        photo, label = (Image.open(io.BytesIO(archive.read(f"val/{name}.{e}"))).convert("RGB") for e in ("jpg", "png"))
        both = Image.new("RGB", (2 * photo.width, photo.height))
        both.paste(label, (0, 0))
        both.paste(photo, (photo.width, 0))
        both.save(tmp_path / f"side/val/{name}.png")
        label.save(tmp_path / f"two/valA/{name}.png")
        photo.save(tmp_path / f"two/valB/{name}.png")
    side = open_pairs(f"side:{tmp_path}/side#val")
    two = open_pairs(f"domains:{tmp_path}/two#val", paired=True)
    arrow = open_pairs(f"folder:{tmp_path}/two#valA => folder:{tmp_path}/two#valB")
    assert len(side) == len(two) == len(arrow) == len(names) == 8
    for a, b, c in zip(side, two, arrow, strict=True):
        assert isinstance(a.image, Pair)
        assert same(a.image.image, b.image.image) and same(b.image.image, c.image.image)
        assert same(a.image.target, b.image.target) and same(b.image.target, c.image.target)


def test_made_pairs(domains: Path) -> None:
    spec = f"folder:{domains}#trainA"
    grey, edges = (open_pairs(f"{kind}:{spec}")[0].image for kind in ("grey", "edges"))
    assert same(grey.target, picture(0)) and same(edges.target, picture(0))
    assert same(grey.image, picture(0).convert("L").convert("RGB"))
    flat = Image.new("RGB", (24, 20), (90, 90, 90))
    flat.paste((200, 200, 200), (12, 0, 24, 20))
    flat.save(domains / "trainA" / "0.png")
    drawn = np.asarray(open_pairs(f"edges:{spec}")[0].image.image)[..., 0]
    assert (drawn[:, 11:13] == 255 - 2 * 110).all() and (drawn[:, :11] == 255).all() and (drawn[:, 13:] == 255).all()


def test_turned(domains: Path) -> None:
    spec = f"grey:folder:{domains}#trainA"
    one, other = open_pairs(spec)[1].image, open_pairs(f"turned:{spec}")[1].image
    assert same(one.image, other.target) and same(one.target, other.image)
    loose = open_pairs(f"turned:{spec}", paired=False)
    assert not is_paired(loose) and same(loose[1].image.image, picture(1))
    back = serial(open_pairs(f"turned:domains:{domains}"))
    assert len(back) == 5 and same(back[4].image.image, picture(11)) and same(back[4].image.target, picture(4))


def test_unpaired_domains_of_different_sizes(domains: Path) -> None:
    source = open_pairs(f"domains:{domains}")
    assert len(source) == 5 and not is_paired(source) and not is_paired(take(source, [0, 1]))
    loader = StepLoader(source, PairTransform(PRE, training=True, paired=False), 5, seed=3)
    step = Step("fit", "main", 0, 9)
    one, again, other = (
        loader(step),
        StepLoader(source, loader.transform, 5, seed=3)(step),
        loader(Step("fit", "main", 1, 9)),
    )
    assert torch.equal(one["target"], again["target"]) and torch.equal(one["image"], again["image"])
    assert not torch.equal(one["target"], other["target"]) and sorted(one["id"]) == sorted(other["id"])
    assert one["image"].shape == one["target"].shape == (5, 3, 16, 16)
    turned = pair_sources(
        open_data(f"folder:{domains}#trainB", labelled=False),
        open_data(f"folder:{domains}#trainA", labelled=False),
        paired=False,
    )
    assert len(turned) == 5 and same(turned[3].image.image, picture(10))


def test_evaluation_goes_through_both_domains_once(domains: Path) -> None:
    source = serial(open_pairs(f"domains:{domains}"))
    found = [s.name for s in source]
    assert found == [f"trainA/{i}.png -> trainB/{i % 3}.png" for i in range(5)]
    assert all(same(s.image.target, picture(10 + i % 3)) for i, s in enumerate(source))
    part = serial(take(open_pairs(f"domains:{domains}"), [4, 0]))
    assert [s.name for s in part] == [found[4], found[0]]
    paired = open_pairs(f"grey:folder:{domains}#trainA")
    assert serial(paired) is paired


def test_pairs_share_crop_and_flip_and_unpaired_pictures_do_not(domains: Path) -> None:
    source = open_pairs(f"folder:{domains}#trainA => folder:{domains}#trainA")
    batch = StepLoader(source, PairTransform(PRE, training=True), 5)(Step("fit", "main", 0, 1))
    assert torch.equal(batch["image"], batch["target"])
    loose = StepLoader(source, PairTransform(PRE, training=True, paired=False), 5)(Step("fit", "main", 0, 1))
    assert not torch.equal(loose["image"], loose["target"])
    assert UNPAIRED in loose and UNPAIRED not in batch
    still = next(batches(source, PairTransform(PRE), 5))
    want = np.asarray(picture(0).resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    assert torch.allclose(still["image"][0], torch.from_numpy(want).permute(2, 0, 1), atol=1e-6)


def test_channels_and_single_pictures(domains: Path) -> None:
    grey = Preprocessing(size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    both = PairTransform(grey, 3)(Pair(picture(0), picture(1)))
    assert both["image"].shape == (1, 16, 16) and both["target"].shape == (3, 16, 16)
    halves = PairTransform(PRE)(picture(2))
    whole = PairTransform(PRE)(Pair(picture(2).crop((0, 0, 12, 20)), picture(2).crop((12, 0, 24, 20))))
    assert all(torch.equal(halves[k], whole[k]) for k in whole)


def test_a_broken_picture_of_either_domain_is_skipped_and_named(domains: Path) -> None:
    (domains / "trainB" / "1.png").write_bytes(b"no picture")
    source = open_pairs(f"domains:{domains}")
    loader = StepLoader(source, PairTransform(PRE, paired=False), 5, max_failed_share=1.0)
    for i in range(4):
        assert len(loader(Step("fit", "main", i, 4))["id"]) == 5
    assert source.failed


@pytest.mark.parametrize(
    ("spec", "paired", "says"),
    [
        ("domains:{0}", True, "5 pictures in .* and 3 in .*paired domains need one for one"),
        ("folder:{0}#trainA => folder:{0}#trainB", None, "translate without pairs"),
        ("domains:{0}#test", None, "folder testA: no images found"),
        ("folder:{0}#trainA", None, "names no pairs; expected side:PATH"),
        ("sides:{0}", None, "did you mean 'side'"),
        ("grey:", None, "names no pairs"),
        ("turned:folder:{0}", None, "names no pairs"),
    ],
)
def test_bad_specifications_are_refused(domains: Path, spec: str, paired, says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_pairs(spec.format(domains), paired=paired)


def test_paired_domains_need_the_same_names(domains: Path) -> None:
    for i in (3, 4):
        picture(i).save(domains / "trainB" / f"other{i}.png")
    with pytest.raises(DataError, match="'3' is in one of the folders only"):
        open_pairs(f"domains:{domains}", paired=True)
    with pytest.raises(RecipeError, match="1 .no crop. or more"):
        PairTransform(PRE, load=0.5)
