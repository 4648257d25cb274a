"""Any MODEL (module, spec, graph file) as something a runtime can load."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from gossamer.core.errors import ModelError
from gossamer.export.artefact import DESCRIPTION, read_artefact
from gossamer.export.exporting import export
from gossamer.models.build import load_model
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.pipeline.measure import FORMATS
from gossamer.runtimes.routed import ROUTING, is_routing, read_routing

__all__ = ["GRAPHS", "graph_for", "is_graph", "resolve"]

GRAPHS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}
"""Graph files and the runtimes that read them."""


def is_graph(model: nn.Module | str) -> bool:
    """Whether ``model`` names a graph file, the description of a routed model, or the folder of an export."""
    if not isinstance(model, str):
        return False
    return Path(model).suffix in GRAPHS or Path(model).name == ROUTING or (Path(model) / DESCRIPTION).is_file()


def _readers(graph: Path) -> tuple[str, ...]:
    """Return the runtimes that can run a graph, or all graphs of a routed model."""
    return GRAPHS[Path(read_routing(graph)[0].router if is_routing(graph) else graph).suffix]


def resolve(model: nn.Module | str) -> tuple[nn.Module | Path, Preprocessing]:
    """Return the module or graph file and its preprocessing.

    Raises:
        ModelError: The file is missing, or a graph has no ``preprocessing.json`` beside it.
    """
    if isinstance(model, str) and is_graph(model):
        path = Path(model)
        if path.is_dir():
            path = read_artefact(path).graph
        if not path.is_file():
            raise ModelError(f"{model}: no such file; expected an .onnx or .xml graph, or {ROUTING}")
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
        if runtime not in _readers(model):
            what = "its graphs" if is_routing(model) else f"{model.suffix} files"
            raise ModelError(f"{model}: {runtime} cannot run {what}; runtimes that can: {', '.join(_readers(model))}")
        return model
    if runtime == "torch":
        return model
    return export(model, folder / f"{runtime}-b{batch}", format=FORMATS[runtime], batch=batch).graph
