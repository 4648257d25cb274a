"""Rebuild the set that ships inside the package (src/gossamer/data/embedded) from a data folder.

Usage: python scripts/build_embedded.py DATA_FOLDER

DATA_FOLDER holds ``imagenet_sample.zip`` (photographs under ``nips17/`` with ``labels.csv`` and
``classes.csv``) and ``weights/vit_tiny_patch16_224_fp16.safetensors``. The result is deterministic.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import shutil
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "src" / "gossamer" / "data" / "embedded"
PREFIX = "nips17/"
CALIBRATION, SEARCH = 32, 168
STAMP = (1980, 1, 1, 0, 0, 0)
COLUMNS = ("file", "label", "name", "split", "author", "license", "landing_url")

CREDITS = """# Credits of the embedded set

## Model

`vit_tiny_patch16_224.safetensors`: ViT-Ti/16 trained on ImageNet-21k and fine-tuned on ImageNet-1k, the "augreg"
checkpoints of Steiner et al., "How to train your ViT?" (arXiv 2106.10270), released by Google under the Apache-2.0
licence; key names of timm, values rounded to 16-bit floating point.

## Photographs

`photos.zip`: {count} photographs from Flickr, each by the author and under the Creative Commons Attribution (CC BY)
licence stated in `photos.csv` (columns `author`, `license`, `landing_url`). Changes: cropped and resized to 256 x 256
pixels and stored as JPEG. Selection and labels: development set of the NIPS 2017 adversarial-examples competition,
labelled with ImageNet-1k classes. They were chosen so that common models recognise them: figures on them compare
models with one another and are not ImageNet accuracies.

## Split

Photographs in the order of the BLAKE2b digest of their file names: the first {calibration} are `calibration`, the next
{search} `search`, the remaining {evaluation} `eval`. Search, calibration and training never see `eval`.
"""


def split_of(files: list[str]) -> dict[str, str]:
    """Return the split of every file: a function of the names alone."""
    order = sorted(files, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest())
    kinds = ["calibration"] * CALIBRATION + ["search"] * SEARCH
    return {name: kinds[i] if i < len(kinds) else "eval" for i, name in enumerate(order)}


def write_photos(archive: zipfile.ZipFile) -> int:
    """Write photos.zip and photos.csv; return the number of photographs."""
    rows = list(csv.DictReader(io.TextIOWrapper(archive.open("labels.csv"), encoding="utf-8")))
    rows = sorted((r for r in rows if r["file"].startswith(PREFIX)), key=lambda r: r["file"])
    names = {r["file"]: r["file"].removeprefix(PREFIX) for r in rows}
    split = split_of(list(names.values()))
    with zipfile.ZipFile(TARGET / "photos.zip", "w", zipfile.ZIP_STORED) as out:
        for row in rows:
            out.writestr(zipfile.ZipInfo(names[row["file"]], STAMP), archive.read(row["file"]))
    with (TARGET / "photos.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            name = names[row["file"]]
            table.writerow({**row, "file": name, "split": split[name]})
    return len(rows)


def main() -> None:
    """Write all files of the embedded set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with imagenet_sample.zip and weights/")
    folder = parser.parse_args().folder
    TARGET.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(
        folder / "weights" / "vit_tiny_patch16_224_fp16.safetensors", TARGET / "vit_tiny_patch16_224.safetensors"
    )
    with zipfile.ZipFile(folder / "imagenet_sample.zip") as archive:
        count = write_photos(archive)
        classes = csv.DictReader(io.TextIOWrapper(archive.open("classes.csv"), encoding="utf-8"))
        lines = [f"{row['index']},{row['wnid']},{row['name']}" for row in classes]
    (TARGET / "imagenet_classes.csv").write_text("\n".join(["index,wnid,name", *lines]) + "\n", encoding="utf-8")
    (TARGET / "CREDITS.md").write_text(
        CREDITS.format(count=count, calibration=CALIBRATION, search=SEARCH, evaluation=count - CALIBRATION - SEARCH),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
