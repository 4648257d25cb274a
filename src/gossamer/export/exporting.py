"""A finished model to a graph file with its preprocessing and a proof of parity."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError, RunError, nearest
from gossamer.cost.ledger import cost
from gossamer.export.artefact import DESCRIPTION, Artefact, read_artefact, write_artefact
from gossamer.export.layout import lay_out
from gossamer.export.onnx import DEFAULT_OPSET, trace, write
from gossamer.export.openvino import convert
from gossamer.export.verify import RUNTIMES, has_int8, verify
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.models.store import require_disk
from gossamer.ops.routing import Routed, deployed
from gossamer.runtimes import get
from gossamer.runtimes.routed import BranchGraph, Routing, write_routing

__all__ = ["Artefact", "export", "export_once", "read_artefact", "write_graph"]

_FREE_BATCH = 2
_MIB = 2**20
_ROUTER = "router"


@dataclass(frozen=True)
class _Kind:
    """What is written: see ``export``; ``preprocessing`` is what the model's images went through."""

    format: str
    batch: int | str
    opset: int
    fp16: bool
    tolerance: float | None
    preprocessing: Preprocessing


def _example(size: tuple[int, int, int], batch: int | str) -> Tensor:
    """Return reproducible random images for tracing and for the proof.

    Raises:
        RecipeError: The batch is neither a positive number nor "dynamic".
    """
    if batch == "dynamic":
        count = _FREE_BATCH
    elif isinstance(batch, int) and not isinstance(batch, bool) and batch > 0:
        count = batch
    else:
        raise RecipeError(f"export: batch={batch!r}; allowed are 1, 2, ... and 'dynamic'")
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _needed(model: nn.Module, format: str) -> int:
    """Return the bytes an export may take on disk while it is written."""
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return (3 if format == "openvino" else 2) * weights + 4 * _MIB


def write_graph(
    model: nn.Module, example: Tensor, folder: Path, format: str, *, dynamic: bool = False,
    opset: int = DEFAULT_OPSET, fp16: bool = False,
) -> Path:  # fmt: skip
    """Write a module as a graph laid out for its runtime, without proof or preprocessing; returns the file.

    For a part of a model that is only to be timed; ``export`` is for what ships.

    Args:
        model: Module in evaluation mode, on the CPU, in float32.
        example: Its input, batch first.
        folder: Existing folder.
        format: ``"onnx"`` or ``"openvino"``.
        dynamic: Leave the batch free.
        opset: ONNX operator set.
        fp16: Store float weights of an IR in 16 bits.
    """
    graph = trace(model, example, dynamic=dynamic, opset=opset)
    lay_out(graph, RUNTIMES[format])
    source = folder / "model.onnx"
    write(graph, source)
    if format != "openvino":
        return source
    target = folder / "model.xml"
    convert(source, target, fp16=fp16)
    for file in (source, Path(f"{source}.data")):
        file.unlink(missing_ok=True)
    return target


def export(  # noqa: PLR0913 - each is a separate choice of the user
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "openvino",
    batch: int | str = 1,
    example: Tensor | None = None,
    opset: int = DEFAULT_OPSET,
    fp16: bool = False,
    tolerance: float | None = None,
) -> Artefact:
    """Write ``model`` as a graph into the folder ``path`` and prove that it computes the same.

    ONNX files are laid out for ONNX Runtime, IR files for OpenVINO (``export.layout``); 8-bit layers
    become QuantizeLinear / DequantizeLinear around them, with weights stored as int8. A model that routes its images
    (``ops.routing``) becomes a set of graphs under one description.

    Args:
        model: Finished model; is not changed.
        path: Folder; is made.
        format: ``"onnx"`` or ``"openvino"``.
        batch: Images per call, or ``"dynamic"``.
        example: Preprocessed images [B, C, H, W] for tracing and the proof, B as ``batch``
            (2 or more for a free batch); random by default.
        opset: ONNX operator set.
        fp16: Store float weights of an IR in 16 bits.
        tolerance: Largest relative error of the logits; by default ``verify.TOLERANCE``.

    Raises:
        RecipeError: Unknown format, batch or opset, or the runtime is not installed.
        ModelError: The model cannot be traced or converted.
        RunError: Not enough disk, or the graph does not compute what the model does.
    """
    if format not in RUNTIMES:
        hint = nearest(format, RUNTIMES)
        raise RecipeError(f"export: format {format!r} is unknown; allowed are {', '.join(RUNTIMES)}{hint}")
    if fp16 and format != "openvino":
        raise RecipeError(f"export: fp16 weights are stored in OpenVINO IR only; got format={format!r}")
    get(RUNTIMES[format])
    pre = preprocessing(model)
    images = _example(pre.size, batch)
    if example is not None:
        if example.dim() != images.dim() or (batch != "dynamic" and example.shape[0] != batch):
            raise ModelError(f"export: example of shape {list(example.shape)}; expected [{batch}, C, H, W]")
        images = example.detach().float().cpu()
    form = deployed(model)
    plain = form if _is_plain(form) else copy.deepcopy(form).float().cpu().eval()
    require_disk(path, _needed(plain, format))
    kind = _Kind(format, batch, opset, fp16, tolerance, pre)
    if isinstance(plain, Routed):
        return _write_set(plain, images, Path(path), kind)
    return _write_proven(plain, images, Path(path), kind)


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)


def _write_proven(model: nn.Module, images: Tensor, folder: Path, kind: _Kind) -> Artefact:
    """Write one graph with its proof and preprocessing."""
    _clear(folder)
    free = kind.batch == "dynamic"
    try:
        target = write_graph(model, images, folder, kind.format, dynamic=free, opset=kind.opset, fp16=kind.fp16)
    except OSError as err:
        reason = f"writing failed ({err.strerror or err})"
        raise RunError(f"export to {folder}: {reason}; free some disk or choose another folder") from err
    draft = Artefact(
        target, kind.format, kind.batch, kind.opset, int8=has_int8(model), fp16=kind.fp16,
        preprocessing=kind.preprocessing,
    )  # fmt: skip
    proof = verify(draft, model, images, tolerance=kind.tolerance)
    return write_artefact(replace(draft, parity=proof.to_json()))


def _write_set(model: Routed, images: Tensor, folder: Path, kind: _Kind) -> Artefact:
    """Write router and branches as artefacts of their own, each proven, and the file that ties them together.

    A branch gets any number of a call's images, so the batch of the graphs is free unless calls are of one image.
    """
    _clear(folder)
    part = replace(kind, batch=1 if kind.batch == 1 else "dynamic")
    names = [_ROUTER, *(f"branch-{name}" for name in model.names)]
    parts = (model.router, *model.branches)
    done = [_write_proven(m, images, folder / n, part) for m, n in zip(parts, names, strict=True)]
    counted = cost(model, images[:1], saved=False)
    branches = [
        BranchGraph(b.name, f"{n}/{a.graph.name}", b.share, b.macs)
        for b, n, a in zip(counted.branches, names[1:], done[1:], strict=True)
    ]
    router = sum(layer.macs for layer in counted.per_layer if layer.name.split(".")[0] == _ROUTER)
    routing = Routing(f"{_ROUTER}/{done[0].graph.name}", tuple(branches), kind.batch, router)
    worst = max(done, key=lambda a: a.parity["relative"] / a.parity["tolerance"])
    whole = replace(worst, graph=write_routing(routing, folder), batch=kind.batch, int8=any(a.int8 for a in done))
    return write_artefact(whole)


def _is_plain(model: nn.Module) -> bool:
    """Whether the model can be traced as it is: in evaluation mode, on the CPU, in float32."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(m.training for m in model.modules()) and all(
        t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors
    )


def export_once(
    model: nn.Module, path: str | Path, *, format: str, batch: int | str, example: Tensor | None = None,
    opset: int | None = None,
) -> Artefact:  # fmt: skip
    """Return the export in ``path`` if it is complete and of this kind, else make it.

    The folder must belong to this model alone: its weights are not compared.
    """
    folder = Path(path)
    if (folder / DESCRIPTION).is_file():
        found = read_artefact(folder)
        if (found.format, found.batch, found.opset) == (format, batch, opset or DEFAULT_OPSET):
            return found
    return export(model, folder, format=format, batch=batch, example=example, opset=opset or DEFAULT_OPSET)
