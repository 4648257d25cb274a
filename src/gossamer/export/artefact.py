"""The folder an export leaves behind: graph, preprocessing.json, export.json.

A routed model leaves a set: ``routing.json`` in place of the graph, and a folder of this kind for the router and for
each branch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gossamer.core.errors import ModelError, StateError
from gossamer.models.preprocessing import Preprocessing
from gossamer.runtimes.routed import is_routing, read_routing

__all__ = ["DESCRIPTION", "VERSION", "Artefact", "graph_files", "read_artefact", "write_artefact"]

FORMAT = "gossamer-export"
VERSION = 2
"""Newest format read. 2 has routed sets; a single graph is written as 1, which older releases read."""
DESCRIPTION, PREPROCESSING = "export.json", "preprocessing.json"


@dataclass(frozen=True)
class Artefact:
    """An exported model.

    Attributes:
        graph: The file a runtime loads (``model.onnx``, ``model.xml``; ``routing.json`` of a routed model).
        format: ``"onnx"`` or ``"openvino"``.
        batch: Images per call, or ``"dynamic"``.
        opset: ONNX operator set it was traced with.
        parity: Difference from torch (``export.verify.Parity`` as plain numbers).
        int8: Whether it holds layers that round to integer codes (of at most 8 bits, or simulated ones).
        fp16: Whether float weights are stored in 16 bits.
        preprocessing: What has to happen to a picture before.
    """

    graph: Path
    format: str
    batch: int | str
    opset: int
    parity: dict[str, float] = field(default_factory=dict)
    int8: bool = False
    fp16: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def folder(self) -> Path:
        """The folder that holds all of it."""
        return self.graph.parent

    @property
    def size(self) -> int:
        """Bytes of the graph and its weights, of all graphs of a set."""
        return sum(f.stat().st_size for f in graph_files(self.graph))


def graph_files(graph: Path) -> list[Path]:
    """Return the files that a graph consists of: itself, weights beside it, every graph of a routed model."""
    if is_routing(graph):
        routing, folder = read_routing(graph)
        return [graph, *(f for name in routing.graphs for f in graph_files(folder / name))]
    return [p for p in (graph, graph.with_suffix(".bin"), Path(f"{graph}.data")) if p.is_file()]


def write_artefact(artefact: Artefact) -> Artefact:
    """Write the two JSON files; export.json comes last, so that its presence means a complete export."""
    plain: dict[str, Any] = {k: v for k, v in asdict(artefact).items() if k != "preprocessing"}
    plain |= {"graph": artefact.graph.name, "size_bytes": artefact.size}
    text = json.dumps(artefact.preprocessing.to_json(), indent=1)
    (artefact.folder / PREPROCESSING).write_text(text + "\n", encoding="utf-8")
    version = VERSION if is_routing(artefact.graph) else 1
    text = json.dumps({"kind": FORMAT, "version": version, **plain}, indent=1)
    (artefact.folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return artefact


def read_artefact(folder: str | Path) -> Artefact:
    """Read the description of an exported model.

    Raises:
        ModelError: No or unreadable description, or the graph is missing.
        StateError: Written by a newer gossamer.
    """
    where = Path(folder)
    file = where / DESCRIPTION
    if not file.is_file():
        raise ModelError(f"{where}: no {DESCRIPTION}; expected a folder written by gossamer's export")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = int(data["version"])
    except (ValueError, KeyError, TypeError) as err:
        raise ModelError(f"{file}: not a description of an export ({type(err).__name__}); export again") from err
    if version > VERSION:
        raise StateError(f"{file}: version {version}; this gossamer reads up to {VERSION}. Update gossamer")
    try:
        pre = Preprocessing.from_json(json.loads((where / PREPROCESSING).read_text(encoding="utf-8")))
        found = Artefact(
            where / data["graph"], data["format"], data["batch"], data["opset"], data["parity"],
            data["int8"], data["fp16"], pre,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"{where}: incomplete export ({type(err).__name__}: {err}); export again") from err
    if not found.graph.is_file():
        raise ModelError(f"{where}: {found.graph.name} is missing; export again")
    return found
