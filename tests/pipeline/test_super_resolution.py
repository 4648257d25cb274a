"""Super-resolution through the whole pipeline, and a user's own pictures."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gossamer import api, cli
from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.models.build import load_model
from gossamer.pipeline import compressing
from gossamer.pipeline.setup import set_up
from gossamer.tasks.super_resolution import SuperResolution

SMALL = {"depth": 1, "width": 8, "img_size": 16}


def _tiny(scale: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_model(f"edsr_baseline_x{scale}", **SMALL).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        low = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(low).resize((70, 60), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_a_recipe_from_photographs_to_report(photos: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "sr", "model": {"name": "edsr_baseline_x2", "options": SMALL},
        "data": {"train": f"folder:{photos}", "eval_share": 0.25}, "task": {"super_resolution": {"patch": 8}},
        "methods": [{"ptq_minmax": {"images": 4}}], "train": {"steps": 3, "batch_size": 4, "lr": 1e-4},
        "export": {"batch": [1], "rounds": 2, "threads": 1, "formats": []},
    }  # fmt: skip
    (tmp_path / "sr.yaml").write_text(json.dumps(recipe))
    result = api.run(tmp_path / "sr.yaml", out=tmp_path / "run", progress=False)
    row = result.table[-1]
    assert row["metric"]["unit"] == "dB" and row["score"] == row["psnr_y"] and row["images"] == 2
    assert row["paired"]["images"] == 2 and row["precision"].startswith("int8")
    page = result.report.read_text()
    assert "PSNR against latency" in page and "Before and after" in page and page.count("data:image/png") >= 8
    found = api.evaluate(str(tmp_path / "run" / "model"), f"folder:{photos}", limit=2)
    assert found["psnr_y"] > 10 and found["images"] == 2
    graph = next((tmp_path / "run" / "artefacts").glob("*finished*openvino*/model.xml"))
    rows = api.upscale(photos / "0.png", tmp_path / "o.png", str(graph), runtime="openvino", overlap=4)
    assert rows[0]["to"] == [140, 120] and Image.open(tmp_path / "o.png").size == (140, 120)


def test_every_mode_of_picture(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (20, 1))
    colour = np.stack([ramp, ramp.T[:20, :20].repeat(2, 1)[:, :24], ramp], -1)
    made = {
        "grey.png": Image.fromarray(ramp), "alpha.png": Image.fromarray(np.dstack([colour, ramp])),
        "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257), "print.tif": Image.fromarray(colour).convert("CMYK"),
        "palette.png": Image.fromarray(colour).convert("P"),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, image in made.items():
        image.save(tmp_path / "in" / name)
    rows = {Path(r["image"]).name: r for r in api.upscale(tmp_path / "in", tmp_path / "out", _tiny())}
    modes = {n: Image.open(tmp_path / "out" / n).mode for n in made}
    assert modes == {"grey.png": "L", "alpha.png": "RGBA", "deep.png": "L", "print.tif": "RGB", "palette.png": "RGB"}
    assert all(r["to"] == [48, 40] for r in rows.values())
    assert rows["deep.png"]["notes"] == ["16 bits became 8"] and "CMYK" in rows["print.tif"]["notes"][0]
    flat = np.asarray(Image.open(tmp_path / "out" / "alpha.png"))[..., 3]
    assert abs(int(flat[20, 24]) - 120) <= 6


def test_upscale_refusals(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    model = _tiny()
    with pytest.raises(RecipeError, match="scale 4 was asked for, the model enlarges by 2"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.png", model, scale=4)
    with pytest.raises(ModelError, match="the model is for classification"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.png", load_model("preact_resnet8"))
    with pytest.raises(DataError, match="transparency, which .jpg cannot hold"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.jpg", model)
    with pytest.raises(DataError, match="cannot be read"):
        api.upscale(tmp_path / "broken.png", tmp_path / "o.png", model)
    with pytest.raises(DataError, match="no file or folder"):
        api.upscale(tmp_path / "none.png", tmp_path / "o.png", model)
    with pytest.raises(DataError, match="cannot be written .*; end it in one of"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.xyz", model)
    with pytest.raises(DataError, match="cannot be written .*; name another place"):
        api.upscale(tmp_path / "a.png", tmp_path / "broken.png" / "o.png", model)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif' cannot be read .floating-point pixels"):
        api.upscale(tmp_path / "float.tif", tmp_path / "o.png", model)
    with pytest.raises(ModelError, match="random weights; give 'edsr_baseline_x2@weights.safetensors'"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.png", "edsr_baseline_x2")
    with pytest.raises(RecipeError, match="takes 16x16 pixels and nothing else; leave tile out"):
        api.upscale(tmp_path / "a.png", tmp_path / "o.png", model, tile=8, runtime="onnxruntime")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        api.upscale(tmp_path / "empty", tmp_path / "o", model)


def test_originals_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    for source, target in (("in/a.png", "in/a.png"), ("in/a.png", "in"), ("in", "in")):
        with pytest.raises(DataError, match="originals are not written over"):
            api.upscale(tmp_path / source, tmp_path / target, _tiny())
    assert Image.open(tmp_path / "in" / "a.png").size == (8, 8)
    (tmp_path / "out").mkdir()
    assert api.upscale(tmp_path / "in" / "a.png", tmp_path / "out", _tiny())[0]["out"] == str(tmp_path / "out/a.png")


def test_a_folder_goes_on_after_a_broken_picture(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "b.png")
    saved = api.save(_tiny(), tmp_path / "model")
    words = ["upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(saved)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and (tmp_path / "out" / "b.png").is_file()
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: upscale: 1 of 2 pictures were left out") and "a.png" in last


def test_sixteen_bit_colour_is_said_to_become_eight(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes(8 * 6) for _ in range(8))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert api.upscale(tmp_path / "a.png", tmp_path / "o.png", _tiny())[0]["notes"] == ["16 bits became 8"]


def test_upscale_on_the_command_line(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), (40, 80, 120)).save(tmp_path / "a.png")
    saved = api.save(_tiny(), tmp_path / "model")
    words = ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--model", str(saved), "--json"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0 and json.loads(result.stdout)[0]["to"] == [18, 14]


def test_export_to_int8_states_the_loss_in_decibels(photos: Path, tmp_path: Path) -> None:
    found = api.export(_tiny(), tmp_path / "o", ["onnx"], int8=True, data=f"folder:{photos}", max_drop=20.0)
    assert {"psnr_y_before", "psnr_y"} <= found["artefacts"][0].keys()


def test_peak_memory_follows_the_tile(tmp_path: Path) -> None:
    seen = []
    model = _tiny()
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[2] * args[0].shape[3]))
    Image.fromarray(np.zeros((90, 160, 3), np.uint8)).save(tmp_path / "a.png")
    api.upscale(tmp_path / "a.png", tmp_path / "b.png", model, tile=48, overlap=8)
    assert max(seen) <= 48 * 48 and len(seen) > 4


def test_compress_takes_the_task_from_the_model(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(compressing, "execute", lambda recipe, folder, **rest: calls.append({"recipe": recipe, **rest}))
    saved = api.save(_tiny(), tmp_path / "saved")
    api.compress(str(saved), f"folder:{photos}", ["fqsr"], train={"steps": 2}, out=tmp_path / "run", progress=False)
    call = calls[0]
    setup = set_up(call["recipe"], methods=call["methods"], sources=call["sources"])
    patches = {"super_resolution": {"patch": 9}}
    api.compress(str(saved), f"folder:{photos}", ["fqsr"], task=patches, out=tmp_path / "r", progress=False)
    assert calls[1]["recipe"].task == patches
    assert setup.task == SuperResolution(scale=2) and len(setup.evaluation) == 2
    assert {n: len(v.source) for n, v in setup.loaders.items()} == dict.fromkeys(setup.loaders, 6)
