"""Accuracy and latency of every stage inside the runtimes that ship."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.schedule import Batch, Step
from gossamer.cost.latency import bench, ratio
from gossamer.cost.ledger import Cost, cost
from gossamer.data.loading import StepLoader
from gossamer.data.sources import ImageSource
from gossamer.export.artefact import graph_files
from gossamer.export.exporting import export_once
from gossamer.models.preprocessing import Preprocessing
from gossamer.pipeline.stages import Stage
from gossamer.recipe import ExportSettings
from gossamer.runtimes import Session, as_recorded, get
from gossamer.tasks.task import Evaluation, Metric, Task, predict_with

__all__ = ["FORMATS", "Measured", "Prepared", "measure", "runtime_score"]

KEEP_IMAGES = 2000
"""Evaluation sets up to this size stay decoded in memory while several models are measured on them."""
FORMATS = {"openvino": "openvino", "onnxruntime": "onnx"}
"""Artefact format that each runtime executes."""


@dataclass
class Measured:
    """One row: a stage in one runtime at one precision."""

    stage: Stage
    runtime: str
    precision: str
    cost: Cost
    files: dict[int, Path] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    latency: dict[int, dict[str, Any]] = field(default_factory=dict)
    agreement: dict[str, Any] | None = None
    chosen: bool = False
    note: str = ""
    metric: Metric | None = None

    @property
    def int8(self) -> bool:
        """Whether the stage holds 8-bit layers (its graph mixes int8 kernels with the named precision)."""
        return any(getattr(layer, "weight_bits", 32) <= 8 for layer in self.cost.per_layer if layer.macs)

    def row(self) -> dict[str, Any]:
        """Return the row as JSON, with the keys the report reads."""
        size = sum(p.stat().st_size for p in graph_files(next(iter(self.files.values())))) if self.files else None
        ev = self.evaluation
        return {
            "stage": self.stage.title,
            "name": self.stage.name,
            "runtime": self.runtime,
            "precision": f"int8+{self.precision}" if self.int8 else self.precision,
            "macs": self.cost.macs,
            "bops": self.cost.bops,
            "params": self.cost.params,
            "memory_bytes": self.cost.memory_bytes,
            "file_bytes": size,
            "images": None,
            **({} if ev is None else ev.to_json()),
            "metric": None if self.metric is None else self.metric.to_json(),
            "score": None if ev is None else ev.score,
            "score_interval": None if ev is None or ev.score_interval is None else list(ev.score_interval),
            "agreement": None if self.agreement is None else self.agreement.get("agreement"),
            "paired": self.agreement,
            "latency": {str(b): v for b, v in self.latency.items()},
            "chosen": self.chosen,
            "note": self.note,
        }


class Prepared:
    """Evaluation batches that can be gone through again; a small set is decoded once and kept.

    Args:
        images: The images.
        pre: Preprocessing.
        batch: Images a batch; the last may be smaller.
        task: The task, which reads them.
    """

    def __init__(self, images: ImageSource, pre: Preprocessing, batch: int, task: Task) -> None:
        self._make = lambda: task.batches(images, pre, batch)
        self._kept: list[Batch] | None = None
        self._small = len(images) <= KEEP_IMAGES

    def __iter__(self) -> Iterator[Batch]:
        if self._small and self._kept is None:
            self._kept = list(self._make())
        return iter(self._kept) if self._kept is not None else iter(self._make())


def runtime_score(session: Session, loaded: Iterable[Batch], task: Task, batch: int) -> Evaluation:
    """Evaluate a session by ``batch`` images; where its graph takes no fewer, the last batch is padded."""
    shape = session.input_shape
    fixed = shape is not None and shape[0] is not None

    def predict(x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        full = torch.cat([x, x[:1].expand(batch - n, *x.shape[1:])]) if n < batch and fixed else x
        return torch.from_numpy(np.asarray(session.run(full.numpy())))[:n]

    size = None if shape is None or len(shape) != 4 or None in shape[1:] else tuple(int(n or 0) for n in shape[1:])
    return task.evaluate(predict_with(predict, size), loaded)  # type: ignore[arg-type]


def _precisions(stage: Stage, runtime: str) -> tuple[str, ...]:
    native = get(runtime).precisions()
    return native if stage.name == "dense" else (native[-1],)


def _examples(images: ImageSource | None, pre: Preprocessing, count: int, task: Task) -> torch.Tensor | None:
    """Return real images for the proof of parity: on noise, a token-reduced model's choices are all close calls."""
    if images is None or len(images) < count:
        return None
    loader = StepLoader(images, task.still_view(pre), count, shuffle=False)
    return loader(Step("examples", "main", 0, 1))["image"]


def _export_rows(
    stages: Sequence[Stage], settings: ExportSettings, out: Path, examples: torch.Tensor | None, metric: Metric
) -> list[Measured]:
    """Export every stage for every measured runtime and batch, the last one in all other forms asked for too."""
    rows = []
    for stage in stages:
        model = stage.model()
        ledger = cost(model, saved=False)

        def graph(format: str, batch: int | str, stage: Stage = stage, model: nn.Module = model) -> Path:
            example = None if examples is None or isinstance(batch, str) else examples[:batch]
            return export_once(
                model, out / f"{stage.folder.name}-{format}-b{batch}", format=format, batch=batch, example=example,
                opset=settings.opset,
            ).graph  # fmt: skip

        for runtime in settings.runtimes:
            files = {b: graph(FORMATS[runtime], b) for b in settings.sizes}
            for precision in _precisions(stage, runtime):
                rows.append(Measured(stage, runtime, precision, ledger, files, metric=metric))
        for format in settings.formats if stage is stages[-1] else ():
            for b in settings.batch:
                graph(format, b)
    return rows


def _time(rows: list[Measured], batch: int, settings: ExportSettings, size: tuple[int, int, int]) -> None:
    """Time all rows of one runtime and the dense model in torch in one interleaved run; fill in their ratios.

    The images are noise: a routed model takes its branches by the shares it recorded.
    """
    x = np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32)
    threads = settings.threads
    dense = [i for i, r in enumerate(rows) if r.stage.name == "dense"]
    loaded = (get(r.runtime).load(r.files[batch], precision=r.precision, threads=threads) for r in rows)
    sessions = [as_recorded(session) for session in loaded]
    eager = get("torch").load(rows[dense[0]].stage.model(), precision="f32", threads=threads)
    *timings, in_torch = bench([*sessions, eager], x, rounds=settings.rounds)
    fp32 = next(i for i in dense if rows[i].precision == "f32")
    best = min(dense, key=lambda i: timings[i].median_ms)
    for i, row in enumerate(rows):
        row.latency[batch] = {
            "median_ms": timings[i].median_ms,
            "iqr_ms": timings[i].iqr_ms,
            "ratio_torch": ratio(in_torch, timings[i])[1],
            "ratio_fp32": ratio(timings[fp32], timings[i])[1],
            "ratio_best_dense": ratio(timings[best], timings[i])[1],
            "best_dense": rows[best].precision,
            "trusted": timings[i].trusted,
            "reason": timings[i].reason,
        }


def _scores(
    rows: list[Measured], images: ImageSource, pre: Preprocessing, task: Task, threads: int,
    tick: Callable[[str], None],
) -> None:  # fmt: skip
    loaded = Prepared(images, pre, max(rows[0].files), task)
    for runtime in dict.fromkeys(r.runtime for r in rows):
        mine = [r for r in rows if r.runtime == runtime]
        for row in mine:
            b = max(row.files)
            session = get(runtime).load(row.files[b], precision=row.precision, threads=threads)
            row.evaluation = runtime_score(session, loaded, task, b)
            tick(f"{row.stage.title}, {runtime} {row.precision}")
        reference = next(r for r in mine if r.stage.name == "dense" and r.precision == "f32").evaluation
        for row in mine:
            if reference is not None and row.evaluation is not None:
                row.agreement = task.compare(reference, row.evaluation)


def _why_not(row: Measured, dense: Measured, best: str) -> str:
    """Return the likely reason why a row gains nothing over the best dense precision."""
    if row.int8:
        return (
            f"int8 kernels gain nothing over {best} here; rounding, and what stays in float between the products, "
            "costs more than they save"
        )
    if row.cost.macs == dense.cost.macs:
        return "it is the dense graph with other weights"
    return "the steps that pick what is computed cost more than the products saved at this size"


def _explain(rows: Sequence[Measured], batch: int) -> None:
    """Say of every row that is not faster than the best dense one that it is not, and why; mark the fastest."""
    for runtime in dict.fromkeys(r.runtime for r in rows):
        mine = [r for r in rows if r.runtime == runtime]
        dense, last = mine[0], [r for r in mine if r.stage.name != "dense"]
        if last:
            min(last, key=lambda r: r.latency[batch]["median_ms"]).chosen = True
        for row in last:
            ratio_best, best = (row.latency[batch][k] for k in ("ratio_best_dense", "best_dense"))
            if ratio_best < 1.0:
                row.note = f"not faster than dense {best} ({ratio_best:.2f}x): {_why_not(row, dense, best)}"


def measure(
    stages: Sequence[Stage],
    images: ImageSource | None,
    pre: Preprocessing,
    task: Task,
    out: Path,
    settings: ExportSettings,
    tick: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Export every stage, evaluate it and time it in the runtimes.

    Args:
        stages: Saved stages; the first is the dense one.
        images: Evaluation images, or ``None`` for speed only.
        pre: Preprocessing.
        task: The task.
        out: Folder for the artefacts.
        settings: Runtimes, formats, batch sizes (accuracy uses the largest), threads, rounds.
        tick: Told about every finished piece of work.

    Returns:
        One row per stage, runtime and precision. Dense models are measured at every precision the
        CPU runs natively, the others at the best of them.
    """
    rows = _export_rows(stages, settings, out, _examples(images, pre, max(settings.sizes), task), task.metric)
    tick("exported")
    for runtime in settings.runtimes:
        mine = [r for r in rows if r.runtime == runtime]
        for b in settings.sizes:
            _time(mine, b, settings, pre.size)
            tick(f"timed {runtime}, batch {b}")
    if images is not None:
        _scores(rows, images, pre, task, settings.threads, tick)
    _explain(rows, max(settings.sizes))
    return rows
