"""Any MODEL (module, spec, graph file) as something a runtime can load."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from gossamer.core.errors import ModelError
from gossamer.export.exporting import export
from gossamer.models.build import load_model
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.pipeline.measure import FORMATS

__all__ = ["GRAPHS", "graph_for", "is_graph", "resolve"]

GRAPHS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}
"""Graph files and the runtimes that read them."""


def is_graph(model: nn.Module | str) -> bool:
    """Whether ``model`` names a graph file."""
    return isinstance(model, str) and Path(model).suffix in GRAPHS


def resolve(model: nn.Module | str) -> tuple[nn.Module | Path, Preprocessing]:
    """Return the module or graph file and its preprocessing.

    Raises:
        ModelError: The file is missing, or a graph has no ``preprocessing.json`` beside it.
    """
    if isinstance(model, str) and is_graph(model):
        path = Path(model)
        if not path.is_file():
            raise ModelError(f"{model}: no such file; expected an .onnx or .xml graph")
        beside = path.parent / "preprocessing.json"
        if not beside.is_file():
            raise ModelError(f"{model}: no preprocessing.json beside it; export the model with gossamer to get one")
        return path, Preprocessing.from_json(json.loads(beside.read_text(encoding="utf-8")))
    module = load_model(model).eval() if isinstance(model, str) else model.eval()
    return module, preprocessing(module)


def graph_for(model: nn.Module | Path, runtime: str, batch: int, folder: Path) -> nn.Module | Path:
    """Return what ``runtime`` loads: the module for torch, else a static graph for ``batch`` images.

    Raises:
        ModelError: The runtime cannot read that kind of file.
    """
    if isinstance(model, Path):
        if runtime not in GRAPHS[model.suffix]:
            raise ModelError(
                f"{model}: {runtime} cannot run {model.suffix} files; runtimes that can: "
                f"{', '.join(GRAPHS[model.suffix])}"
            )
        return model
    if runtime == "torch":
        return model
    return export(model, folder / f"{runtime}-b{batch}", format=FORMATS[runtime], batch=batch).graph
