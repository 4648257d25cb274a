"""The folder an export leaves behind: graph, preprocessing.json, export.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gossamer.core.errors import ModelError, StateError
from gossamer.models.preprocessing import Preprocessing

__all__ = ["DESCRIPTION", "VERSION", "Artefact", "read_artefact", "write_artefact"]

FORMAT = "gossamer-export"
VERSION = 1
DESCRIPTION, PREPROCESSING = "export.json", "preprocessing.json"


@dataclass(frozen=True)
class Artefact:
    """An exported model.

    Attributes:
        graph: The file a runtime loads (``model.onnx`` or ``model.xml``).
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
        """Bytes of the graph and its weights."""
        beside = (self.graph, self.graph.with_suffix(".bin"), Path(f"{self.graph}.data"))
        return sum(f.stat().st_size for f in beside if f.is_file())


def write_artefact(artefact: Artefact) -> Artefact:
    """Write the two JSON files; export.json comes last, so that its presence means a complete export."""
    plain: dict[str, Any] = {k: v for k, v in asdict(artefact).items() if k != "preprocessing"}
    plain |= {"graph": artefact.graph.name, "size_bytes": artefact.size}
    text = json.dumps(artefact.preprocessing.to_json(), indent=1)
    (artefact.folder / PREPROCESSING).write_text(text + "\n", encoding="utf-8")
    text = json.dumps({"kind": FORMAT, "version": VERSION, **plain}, indent=1)
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
