"""A routed model as a set of graphs: files, proof, runtimes, the verbs of the command line, the runner."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gossamer import api
from gossamer.core.errors import DataError, ModelError, StateError
from gossamer.export.artefact import graph_files, read_artefact
from gossamer.export.exporting import export
from gossamer.export.runner import Runner, find_pictures, main
from gossamer.models.source import inherit
from gossamer.ops.routing import Resized, Routed
from gossamer.ops.switchable import shared_copy
from gossamer.runtimes import as_recorded, get
from gossamer.runtimes.routed import ROUTING, RoutedSession, apportion, read_routing

RUNTIME = {"onnx": "onnxruntime", "openvino": "openvino"}
SHARES = (0.5, 0.25, 0.25)


class Bright(nn.Module):
    """Scores by mean brightness: dark, medium, bright images to branches 0, 1, 2."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))[:, None]
        return torch.cat([-mean - 0.5, 0 * mean, mean - 0.5], 1)


def routed() -> Routed:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    net.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}  # type: ignore[assignment]
    branches = [net, *(Resized(shared_copy(net), (s, s)) for s in (24, 16))]
    return inherit(Routed(Resized(Bright(), (16, 16)), branches, ["32", "24", "16"], SHARES), net).eval()


def images(count: int = 9) -> Tensor:
    noise = 0.3 * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return noise + torch.tensor([-1.5, 0.0, 1.5]).repeat(count)[:count].view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The model exported in both formats."""
    folder, model = tmp_path_factory.mktemp("sets"), routed()
    return {f: export(model, folder / f, format=f, batch=8, example=images(8)) for f in RUNTIME}


@pytest.mark.parametrize("format", RUNTIME)
def test_a_set_computes_what_torch_computes(sets, format: str) -> None:
    artefact, model = sets[format], routed()
    assert artefact.graph.name == ROUTING and artefact.parity["relative"] < 1e-4
    session = get(RUNTIME[format]).load(artefact.graph, precision="f32", threads=1)
    assert isinstance(session, RoutedSession) and session.input_shape == (None, 3, 32, 32)
    for count in (8, 1, 9):
        with torch.no_grad():
            np.testing.assert_allclose(session.run(images(count).numpy()), model(images(count)).numpy(), atol=1e-4)
    assert session.chosen.tolist() == [0, 1, 2] * 3 and session.taken == [7, 6, 5]
    by_folder = get(RUNTIME[format]).load(artefact.folder, precision="f32", threads=1)
    np.testing.assert_array_equal(by_folder.run(images().numpy()), session.run(images().numpy()))


def test_a_set_describes_itself(sets) -> None:
    artefact = sets["openvino"]
    assert read_artefact(artefact.folder) == artefact and artefact.preprocessing.size == (3, 32, 32)
    assert json.loads((artefact.folder / "export.json").read_text())["version"] == 2
    assert json.loads((artefact.folder / "branch-24" / "export.json").read_text())["version"] == 1
    routing, folder = read_routing(artefact.graph)
    assert folder == artefact.folder and [b.name for b in routing.branches] == ["32", "24", "16"]
    assert [b.share for b in routing.branches] == list(SHARES)
    found = api.cost(routed())
    assert routing.mean_macs == pytest.approx(found.macs, rel=1e-3)
    files = graph_files(artefact.graph)
    assert len(files) == 9 and artefact.size == sum(f.stat().st_size for f in files)


def test_a_branch_is_an_artefact_of_its_own(sets) -> None:
    folder = sets["onnx"].folder / "branch-16"
    got = get("onnxruntime").load(read_artefact(folder).graph).run(images(4).numpy())
    with torch.no_grad():
        np.testing.assert_allclose(got, routed().branches[2](images(4)).numpy(), atol=1e-4)


def test_calls_of_one_image_have_graphs_of_one_image(tmp_path) -> None:
    artefact = export(routed(), tmp_path, format="openvino", batch=1, example=images(1))
    session = get("openvino").load(artefact.graph, precision="f32", threads=1)
    assert session.input_shape == (1, 3, 32, 32)
    with pytest.raises(ModelError, match=r"takes \[1, 3, 32, 32\]"):
        session.run(images(2).numpy())


def test_noise_is_timed_by_the_recorded_shares(sets) -> None:
    session = as_recorded(get("onnxruntime").load(sets["onnx"].graph, threads=1))
    session.run(images(8).numpy() * 0)
    assert session.taken == [4, 2, 2]
    assert apportion((0.34, 0.33, 0.33), 10) == [4, 3, 3] and sum(apportion((0.2, 0.8), 7)) == 7


def test_profiles_cover_all_parts(sets) -> None:
    session = get("openvino").load(sets["openvino"].graph, precision="f32", threads=1, profile=True)
    with pytest.raises(StateError, match="0 runs"):
        session.profile()
    session.run(images(2).numpy())
    session.run(images(2).numpy())
    names = {op.name.split("/")[0] for op in session.profile()}
    assert names == {"router", "32", "24"}


def test_damaged_sets_are_refused(sets, tmp_path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(sets["onnx"].folder, folder)
    (folder / "branch-16" / "model.onnx").unlink()
    with pytest.raises(ModelError, match="branch-16/model.onnx is missing"):
        get("onnxruntime").load(folder)
    plain = json.loads((folder / ROUTING).read_text())
    (folder / ROUTING).write_text(json.dumps({**plain, "version": 9}))
    with pytest.raises(StateError, match="version 9; this gossamer reads up to 1"):
        get("onnxruntime").load(folder / ROUTING)
    (folder / ROUTING).write_text("{}")
    with pytest.raises(ModelError, match="not a description of a routed model"):
        get("onnxruntime").load(folder)


@pytest.fixture
def pictures(tmp_path):
    """Pictures of several sizes and kinds, dark, medium and bright; one is broken."""
    root, rng = tmp_path / "pictures", np.random.default_rng(0)
    for c, level in enumerate((20, 120, 230)):
        (root / str(c)).mkdir(parents=True)
        for i, size in enumerate(((40, 30), (100, 260), (17, 17))):
            pixels = np.clip(rng.normal(level, 5, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(c) / f"{i}.png")
    Image.new("L", (64, 48), 230).save(root / "2" / "grey.png")
    Image.new("RGBA", (64, 48), (20, 20, 20, 128)).save(root / "0" / "clear.png")
    (root / "1" / "broken.jpg").write_bytes(b"no picture")
    return root


def test_verbs_take_a_set(sets, pictures) -> None:
    folder = str(sets["openvino"].folder)
    (pictures / "1" / "broken.jpg").unlink()
    found = api.evaluate(folder, f"folder:{pictures}", "openvino", batch=4, precision="f32", threads=1)
    assert found["images"] == 11 and found["branches"] == {"32": 4, "24": 3, "16": 4}
    in_torch = api.evaluate(routed(), f"folder:{pictures}", "torch", batch=4, threads=1)
    assert in_torch["top1"] == found["top1"]
    rows = api.bench([folder, f"{folder}/{ROUTING}"], [8], 1, "openvino", precision="f32", rounds=2)
    assert [r["batch"] for r in rows] == [8, 8]
    with pytest.raises(ModelError, match="cannot run its graphs; runtimes that can: openvino"):
        api.evaluate(folder, f"folder:{pictures}", "onnxruntime")


def test_every_branch_gets_int8_steps_of_its_own(sets, tmp_path, pictures) -> None:
    (pictures / "1" / "broken.jpg").unlink()
    result = api.export(routed(), tmp_path, ["onnx"], int8=True, data=f"folder:{pictures}", batch=4)
    folder = tmp_path / "onnx"
    assert result["artefacts"][0]["graph"] == str(folder / ROUTING) and read_artefact(folder).int8
    assert [read_artefact(folder / n).int8 for n in ("router", "branch-32", "branch-16")] == [False, True, True]
    x = images(6).numpy()
    quantized, exact = (get("onnxruntime").load(f, threads=1).run(x) for f in (folder, sets["onnx"].folder))
    assert np.linalg.norm(quantized - exact) < 0.3 * np.linalg.norm(exact)


def test_runner_answers_for_a_folder(sets, pictures) -> None:
    runner = Runner(sets["openvino"].folder, precision="f32", threads=1, window=4)
    answers = list(runner(pictures))
    assert len(answers) == 11 and [n for n, _ in runner.failed] == [str(pictures / "1" / "broken.jpg")]
    expected = {"0": "32", "1": "24", "2": "16"}
    assert all(a.branch == expected[a.name.split("/")[-2]] for a in answers)
    assert all(0 <= a.label < 3 and 0 < a.probability <= 1 for a in answers)
    model, pre = routed(), sets["openvino"].preprocessing
    picture = Image.open(pictures / "1" / "1.png")
    (one,) = runner(picture)
    assert pre.size == (3, 32, 32) and one.branch == "24" and one.name == "picture 0"
    same = next(a for a in answers if a.name.endswith("1/1.png"))
    assert (one.label, one.probability) == (same.label, pytest.approx(same.probability, abs=1e-5))
    with torch.no_grad():
        logits = model(torch.stack([runner._transform(picture.convert("RGB"))]))
    assert one.probability == pytest.approx(float(F.softmax(logits, 1).max()), abs=1e-4)


def test_runner_takes_any_artefact_and_pads_fixed_batches(tmp_path, pictures) -> None:
    artefact = export(routed().branches[0], tmp_path / "plain", format="onnx", batch=4)
    answers = list(Runner(artefact.folder, threads=1, window=5)(find_pictures(pictures)))
    assert len(answers) == 11 and {a.branch for a in answers} == {None}
    with pytest.raises(DataError, match="no pictures"):
        find_pictures(tmp_path / "plain")


def test_runner_from_the_command_line_needs_no_training_code(sets, pictures, capsys) -> None:
    folder = str(sets["onnx"].folder)
    code = (
        "import sys\n"
        "for name in ('engine', 'pipeline', 'methods'): sys.modules['gossamer.' + name] = None\n"
        "sys.modules['accelerate'] = None\n"
        "from gossamer.export.runner import main; sys.exit(main(sys.argv[1:]))\n"
    )
    words = [folder, str(pictures / "0"), str(pictures / "1"), "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 7 and {r["branch"] for r in rows} == {"32", "24"} and "broken.jpg" in done.stderr
    assert main([str(pictures), str(pictures)]) == 2 and "no export.json" in capsys.readouterr().err
