"""A finished model to a graph file with its preprocessing and a proof of parity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import RecipeError, nearest
from gossamer.models.preprocessing import preprocessing
from gossamer.models.store import require_disk
from gossamer.ops import int8  # noqa: F401 - registers the operators that are translated below
from gossamer.runtimes import get

__all__ = ["Artefact", "export", "export_once", "read_artefact"]

VERSION = 1
RUNTIME = {"openvino": "openvino", "onnx": "onnxruntime"}


@dataclass(frozen=True)
class Artefact:
    """An exported model: a folder with graph, preprocessing.json and export.json."""

    graph: Path
    format: str
    batch: int | str
    opset: int
    parity: dict[str, float]


def _translations() -> dict[Any, Any]:
    from onnxscript import opset21 as op

    def quantize(x, scale, zero_point, axis, dtype):  # noqa: ANN001, ANN202 - traced by onnxscript
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize(q, scale, zero_point, axis):  # noqa: ANN001, ANN202
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    return {torch.ops.gossamer.quantize.default: quantize, torch.ops.gossamer.dequantize.default: dequantize}


def export(
    model: nn.Module, path: str | Path, *, format: str = "openvino", batch: int | str = 1, opset: int = 21
) -> Artefact:
    folder = Path(path)
    if format not in RUNTIME:
        raise RecipeError(f"export: format {format!r} is unknown; allowed are {', '.join(RUNTIME)}{nearest(format, RUNTIME)}")
    model = model.eval()
    pre = preprocessing(model)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    require_disk(folder, 3 * size + 2**20)
    folder.mkdir(parents=True, exist_ok=True)
    n = batch if isinstance(batch, int) else 2
    x = torch.randn(n, *pre.size, generator=torch.Generator().manual_seed(0))
    dynamic = None if isinstance(batch, int) else ({0: torch.export.Dim("batch", min=1)},)
    onnx_path = folder / "model.onnx"
    program = torch.onnx.export(
        model, (x,), dynamo=True, opset_version=opset, custom_translation_table=_translations(), dynamic_shapes=dynamic,
        input_names=["image"], output_names=["logits"], verbose=False,
    )
    program.save(str(onnx_path), external_data=False)
    graph = onnx_path
    if format == "openvino":
        from gossamer.runtimes.openvino import import_openvino

        ov = import_openvino()
        graph = folder / "model.xml"
        ov.save_model(ov.convert_model(str(onnx_path)), str(graph), compress_to_fp16=False)
        onnx_path.unlink()
    with torch.no_grad():
        want = model(x).numpy()
    got = get(RUNTIME[format]).load(graph, precision="f32").run(x.numpy())
    parity = {"max_abs": float(np.abs(want - got).max()), "scale": float(np.abs(want).max())}
    (folder / "preprocessing.json").write_text(json.dumps(pre.to_json()), encoding="utf-8")
    artefact = Artefact(graph, format, batch, opset, parity)
    (folder / "export.json").write_text(json.dumps({"version": VERSION, **asdict(artefact), "graph": graph.name}), encoding="utf-8")
    return artefact


def export_once(model: nn.Module, path: Path, *, format: str, batch: int) -> Artefact:
    if (path / "export.json").is_file():
        return read_artefact(path)
    return export(model, path, format=format, batch=batch)


def read_artefact(path: Path) -> Artefact:
    data = json.loads((path / "export.json").read_text(encoding="utf-8"))
    return Artefact(path / data["graph"], data["format"], data["batch"], data["opset"], data["parity"])
