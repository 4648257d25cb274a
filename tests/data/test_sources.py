"""Every kind of image source, and every way in which one can be wrong."""

from __future__ import annotations

import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from gossamer.core.errors import DataError
from gossamer.data.images import Remembered
from gossamer.data.loading import batches
from gossamer.data.sources import check_classes, from_dataset, hold_out, open_data, take
from gossamer.data.transforms import eval_transform
from gossamer.models.preprocessing import Preprocessing

SMALL = eval_transform(Preprocessing(size=(3, 16, 16), crop_pct=1.0))


def encoded(number: int, kind: str = "PNG") -> bytes:
    out = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def read_all(source) -> list[str]:
    return [name for b in batches(source, SMALL, 7) for name in b["id"]]


def test_folder_of_class_folders(folder: Path):
    source = open_data(f"folder:{folder}")
    assert (len(source), source.classes, source.num_classes) == (24, ["cat", "dog", "owl"], 3)
    assert source[9].label == 1 and source[9].name == "dog/1.png" and source[-1].label == 2
    assert source[9].image.mode == "RGB" and source[9].image.size == (40, 40)
    assert [s.label for s in source] == [0] * 8 + [1] * 8 + [2] * 8


def test_number_folders_count_as_numbers(tmp_path: Path):
    for n in (0, 2, 10):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "x.png").write_bytes(encoded(n))
    assert open_data(f"folder:{tmp_path}").classes == ["0", "2", "10"]


def test_flat_folder_with_table(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "labels.csv").write_text("file,label\n0.png,b\n1.png,a\n2.png,b\n")
    source = open_data(f"folder:{tmp_path}")
    assert [s.label for s in source] == [1, 0, 1] and source.classes == ["a", "b"]
    (tmp_path / "labels.csv").write_text("file,label\n0.png,7\n1.png,4\n2.png,7\n")
    source = open_data(f"folder:{tmp_path}")
    assert [s.label for s in source] == [7, 4, 7] and source.num_classes == 8 and not source.knows_classes


def test_zip_is_the_folder_it_packs(folder: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for file in folder.rglob("*.png"):
            z.write(file, f"top/{file.relative_to(folder)}")
    packed, plain = open_data(f"zip:{tmp_path / 'a.zip'}#top"), open_data(f"folder:{folder}")
    assert packed.classes == plain.classes
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(packed, plain, strict=True))


def test_part_and_range(folder: Path):
    assert len(open_data(f"folder:{folder}[2:5]")) == 3
    assert open_data(f"folder:{folder}[0:24:8]").labels == [0, 1, 2]
    part = open_data(f"folder:{folder.parent}#photos[-8:]")
    assert part.labels == [2] * 8 and part.num_classes == 3 and part.classes == ["cat", "dog", "owl"]
    with pytest.raises(DataError, match="no images found"):
        open_data(f"folder:{folder}[24:]")


def test_npz_plain_arrays(tmp_path: Path):
    grey = np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "g.npz", images=grey, labels=np.array([0, 1, 1, 0, 1]))
    source = open_data(f"npz:{tmp_path / 'g.npz'}")
    assert np.array_equal(np.asarray(source[3].image), np.repeat(grey[3][..., None], 3, 2))
    assert source.num_classes == 2 and source.knows_classes


def test_npz_sheets(tmp_path: Path):
    tiles = np.random.default_rng(0).integers(0, 256, (1000, 4, 6, 3), dtype=np.uint8)
    sheet = tiles.reshape(25, 40, 4, 6, 3).swapaxes(1, 2).reshape(100, 240, 3)
    out = BytesIO()
    Image.fromarray(sheet).save(out, "PNG")
    data = {"grid0": np.frombuffer(out.getvalue(), np.uint8), "labels": np.arange(1000) % 10, "index": np.arange(1000)}
    np.savez(tmp_path / "s.npz", **data)
    source = open_data(f"npz:{tmp_path / 's.npz'}")
    assert all(np.array_equal(np.asarray(source[i].image), tiles[i]) for i in (0, 39, 40, 777, 999))


@pytest.mark.parametrize("cell", ["bytes", "struct"])
def test_parquet_and_arrow(tmp_path: Path, cell: str):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional")
    images = [encoded(i) for i in range(4)]
    images[2] = images[2][:100]
    cells = images if cell == "bytes" else [{"bytes": b, "path": None} for b in images]
    table = pa.table({"image": cells, "label": ["b", "a", "b", "a"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        source = open_data(f"parquet:{tmp_path / name}")
        assert source.classes == ["a", "b"] and source.labels == [1, 0, 1, 0]
        assert source[1].image.tobytes() == Image.open(BytesIO(images[1])).tobytes()
        rows = [n for b in batches(source, SMALL, 4, max_failed_share=0.3) for n in b["id"]]
        assert rows == ["row0", "row1", "row3"] and source.failed[0][0] == "row2"
    both = open_data(f"parquet:{tmp_path}")
    assert len(both) == 8


def test_hf_local_folder(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="datasets is optional")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(3)], "label": [0, 1, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "d"))
    source = open_data(f"hf:{tmp_path / 'd'}#train")
    assert source.classes == ["x", "y"] and source.labels == [0, 1, 1]
    assert source[2].image.tobytes() == Image.open(BytesIO(encoded(2))).tobytes()
    with pytest.raises(DataError, match=r"no split; expected one of train, test"):
        open_data(f"hf:{tmp_path / 'd'}")
    with pytest.raises(DataError, match="could not load"):
        open_data(f"hf:{tmp_path / 'nothing-here'}")


def test_any_torch_dataset():
    source = from_dataset(TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])))
    assert source.num_classes == 3 and source[1].image.size == (8, 8)
    assert from_dataset(source) is source
    with pytest.raises(DataError, match="before normalisation"):
        raise_first(from_dataset(TensorDataset(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))))
    with pytest.raises(DataError, match="generator; expected a specification"):
        from_dataset(i for i in range(3))
    with pytest.raises(DataError, match="items are not"):
        from_dataset([1, 2, 3])


def raise_first(source):
    return source[0]


def test_broken_images_are_skipped_counted_and_named(folder: Path):
    (folder / "dog" / "3.png").write_bytes(encoded(3)[:200])
    source = open_data(f"folder:{folder}")
    names = read_all(source)
    assert len(names) == 23 and "dog/3.png" not in names
    assert [n for n, _ in source.failed] == ["dog/3.png"] and "truncated" in source.failed[0][1]
    read_all(source)
    assert len(source.failed) == 1


def test_too_many_broken_images_are_fatal(folder: Path):
    for i in range(2):
        (folder / "dog" / f"{i}.png").write_bytes(b"not a picture")
    source = open_data(f"folder:{folder}")
    with pytest.raises(DataError, match=r"2 of 24 images cannot be read \(dog/0.png, dog/1.png: .*at most 5% may fail"):
        read_all(source)


def _bad_specs(tmp: Path) -> dict[str, str]:
    (tmp / "empty").mkdir()
    (tmp / "flat").mkdir()
    (tmp / "flat" / "a.png").write_bytes(encoded(0))
    (tmp / "columns").mkdir()
    (tmp / "columns" / "labels.csv").write_text("image,class\na.png,1\n")
    (tmp / "broken.zip").write_bytes(b"PK no")
    (tmp / "broken.npz").write_bytes(b"PK no")
    (tmp / "broken.parquet").write_bytes(b"PAR no")
    np.savez(tmp / "keys.npz", pictures=np.zeros(3))
    np.savez(tmp / "floats.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(3, int))
    return {
        f"folder:{tmp}/nowhere": "no folder",
        f"folder:{tmp}/empty": "no images found",
        f"folder:{tmp}/flat": "images without labels",
        f"folder:{tmp}/columns": "expected columns file,label",
        f"zip:{tmp}/nowhere.zip": "no file",
        f"zip:{tmp}/broken.zip": "not a readable zip",
        f"npz:{tmp}/broken.npz": "not a readable .npz",
        f"npz:{tmp}/keys.npz": r"expected images \(or grid0",
        f"npz:{tmp}/floats.npz": "expected uint8",
        f"parquet:{tmp}/broken.parquet": "not a readable parquet",
        f"parquet:{tmp}/empty": "no .parquet",
        f"foldr:{tmp}": "did you mean 'folder'",
        "embedded:evil": "did you mean 'eval'",
        str(tmp): "no data specification",
    }


def test_bad_specifications_are_one_line_errors(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="pyarrow is optional")
    for spec, message in _bad_specs(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            open_data(spec)
        assert "\n" not in str(caught.value)


def test_class_count_must_fit_the_head(folder: Path):
    source, model = open_data(f"folder:{folder}"), nn.Identity()
    model.num_classes = 3
    assert check_classes(source, model) == 3
    for count in (2, 10):
        model.num_classes = count
        with pytest.raises(DataError, match=f"3 classes, the model's head has {count}"):
            check_classes(source, model)
    with pytest.raises(DataError, match="indices"):
        take(source, [24])


def test_shared_layouts(shared_data: Path):
    sizes = {
        "npz:cifar10_test_8000.npz": (8000, 10, 32),
        "npz:fashion_mnist_test_10000.npz": (10000, 10, 28),
        "npz:mnist_test_10000.npz": (10000, 10, 28),
        "zip:imagenet_sample.zip#nips17": (667, 1000, 256),
        "zip:imagenet_sample.zip": (1334, 1000, 256),
        "zip:tiny_imagenet_sample.zip#train": (2000, 10, 64),
    }
    for spec, (count, classes, side) in sizes.items():
        kind, _, name = spec.partition(":")
        source = open_data(f"{kind}:{shared_data}/{name}")
        assert (len(source), source.num_classes, source[count - 1].image.size) == (count, classes, (side, side))


def test_held_out_images_are_disjoint_and_follow_the_seed(folder: Path):
    source = open_data(f"folder:{folder}")
    rest, held = hold_out(source, 0.25, seed=3)
    assert len(held) == 6 and len(rest) == 18 and not set(rest.names) & set(held.names)
    assert set(rest.names) | set(held.names) == set(source.names) and held.num_classes == 3
    assert hold_out(source, 0.25, seed=3)[1].names == held.names
    assert hold_out(source, 0.25, seed=4)[1].names != held.names
    with pytest.raises(DataError, match="leaves a part empty"):
        hold_out(source, 0.01, seed=0)


def test_remembered_pictures_are_decoded_once_within_the_limit() -> None:
    met: list[int] = []

    def read(index: int) -> Image.Image:
        met.append(index)
        return Image.new("RGB", (10, 10), (index, 0, 0))

    keep = Remembered(read, limit=2 * 300)
    for index in (0, 1, 2, 0, 1, 2):
        assert keep(index).getpixel((0, 0)) == (index, 0, 0)
    assert met == [0, 1, 2, 2]
    keep.read = None  # type: ignore[assignment]
    assert pickle.loads(pickle.dumps(keep))._kept == {}
