"""The public functions: what the command line calls, what a script calls."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core import registry
from gossamer.core.errors import RecipeError

if TYPE_CHECKING:  # torch, timm and the runtimes take seconds to import; `gossamer methods` needs none of them
    import torch
    from torch import nn

    from gossamer.core.method import Method
    from gossamer.core.stack import Stack
    from gossamer.cost.ledger import Cost
    from gossamer.pipeline.execute import RunResult
    from gossamer.recipe import Recipe

__all__ = [
    "bench", "card", "compress", "cost", "doctor", "evaluate", "export", "load", "methods", "plan", "quickstart",
    "report", "run", "save", "upscale",
]  # fmt: skip


def _import(name: str) -> Any:
    return importlib.import_module(f"gossamer.{name}")


def _fresh_dir(out: str | Path | None, name: str) -> Path:
    return Path(out) if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


# -- methods --------------------------------------------------------------------------------------
def methods() -> list[dict[str, Any]]:
    """Return the registry: name, title, arxiv, family, tasks, stage, touches, status, class."""
    return [{**dataclasses.asdict(m), "class": m.cls} for m in registry.methods().values()]


def card(name: str) -> str:
    """Return the card (Markdown) of a method by room or class name."""
    return registry.card(name)


# -- runs -----------------------------------------------------------------------------------------
def run(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> RunResult:
    """Run a recipe: train, finish, save, export, measure, report.

    Args:
        recipe: Path of a recipe file, or a ``Recipe``.
        overrides: ``"train.lr=1e-4"`` and the like.
        out: Run folder; default ``runs/<name>-<time>``.
        resume: Continue the interrupted run in ``out``.
        progress: Show progress.

    Raises:
        GossamerError: Bad input, an unmet bound, or an interruption (resumable).
    """
    Recipe = _import("recipe").Recipe  # noqa: N806
    loaded = Recipe.from_yaml(recipe, overrides) if isinstance(recipe, str | Path) else recipe
    say = _import("pipeline.progress").say if progress else (lambda text: None)
    return _import("pipeline.execute").execute(
        loaded, _fresh_dir(out, loaded.name), resume=resume, progress=progress, say=say
    )


def plan(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return phases, turns, groups, edits, cost, estimated time and disk of a recipe, without training."""
    Recipe = _import("recipe").Recipe  # noqa: N806
    loaded = Recipe.from_yaml(recipe, overrides) if isinstance(recipe, str | Path) else recipe
    return _import("pipeline.planning").describe(loaded)


def compress(  # noqa: PLR0913 - the public call; all but three are optional
    model: nn.Module | str,
    data: Any,
    methods: Sequence[Method | str | Mapping[str, Any]],
    *,
    target: Mapping[str, Any] | None = None,
    teacher: Any = None,
    evaluation: Any = None,
    train: Mapping[str, Any] | None = None,
    task: str | Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> RunResult:
    """Compress a model to a target with the given methods.

    Args:
        model: A module, or a MODEL spec (timm name, ``name@weights.safetensors``, saved folder).
        data: Images to search, train and calibrate on: a D spec (``folder:PATH``, ...) or a torch dataset.
        methods: Methods, names, or ``{name: options}``.
        target: ``{"macs": "60%", "max_drop": 0.5}``: macs, bops, params, size, memory, latency as a share
            of dense or absolute, and max_drop in points.
        teacher: For methods of the list that take a teacher and have none: a module, a spec or ``"self"``.
        evaluation: Images to evaluate on; default: a fifth of ``data``, drawn by the seed and kept
            out of training.
        train: Training settings of the recipe (``{"steps": 100, "lr": 1e-4}``); default: no fine-tuning.
        task: ``{name: options}`` where not as the model says, such as ``{"super_resolution": {"patch": 24}}``.
        out: Run folder.
        resume: Continue the interrupted run in ``out``.
        progress: Show progress.

    Raises:
        GossamerError: Bad input, or an unmet target (the result is kept in the run folder).
    """
    return _import("pipeline.compressing").compress(
        model, data, methods, target=target, teacher=teacher, evaluation=evaluation, train=train, task=task,
        run_dir=_fresh_dir(out, "compress"), resume=resume, progress=progress,
    )  # fmt: skip


def quickstart(
    out: str | Path | None = None, *, resume: bool = False, quick: bool = False, progress: bool = True
) -> RunResult:
    """Do the main job on the embedded model and photographs, without network.

    Args:
        out: Run folder; default ``runs/quickstart``.
        resume: Continue an interrupted quickstart.
        quick: A few steps on a few photographs, for tests; the figures mean nothing.
        progress: Show progress.
    """
    return _import("pipeline.quickstart").quickstart(
        Path(out) if out is not None else Path("runs/quickstart"), resume=resume, quick=quick, progress=progress
    )


# -- models ---------------------------------------------------------------------------------------
def _model(spec: str | nn.Module) -> nn.Module:
    return _import("models.build").load_model(spec).eval() if isinstance(spec, str) else spec


def cost(model: nn.Module | str, example: torch.Tensor | Sequence[int] | None = None) -> Cost:
    """Return the ledger of a model: MACs, BOPs, parameters, bytes; in total and per layer.

    Args:
        model: A module or MODEL spec.
        example: Input [B, C, H, W] or its shape (C, H, W); default: the model's own input size, one image.
    """
    import torch

    if example is not None and not isinstance(example, torch.Tensor):
        shape = tuple(int(n) for n in example)
        example = torch.zeros(shape if len(shape) == 4 else (1, *shape))
    return _import("cost.ledger").cost(_model(model), example)


def save(model: nn.Module, path: str | Path, *, stack: Stack | None = None) -> Path:
    """Save a model as ``model.json`` (how to build it: timm name and edits) and ``model.safetensors``."""
    return _import("models.store").save(model, Path(path), stack=stack)


def load(path: str | Path) -> nn.Module:
    """Load a saved model; needs no training code and runs no code from the file."""
    return _import("models.store").load(Path(path))


def evaluate(
    model: nn.Module | str, data: Any, runtime: str = "torch", *, limit: int | None = None, batch: int = 8,
    precision: str | None = None, threads: int = 2, task: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of a model, or of an .onnx/.xml file, on images, in torch or in a runtime.

    Args:
        model: A module, MODEL spec or graph file.
        data: D spec or torch dataset.
        runtime: ``torch``, ``openvino`` or ``onnxruntime``.
        limit: Use the first images only.
        batch: Images at a time.
        precision: ``f32`` or ``bf16``; default: the runtime's f32.
        threads: Threads.
        task: ``{name: options}`` where not as the model says, such as ``{"image_translation": {"extractor": ...}}``.
    """
    return _import("pipeline.evaluating").evaluate(
        model, data, runtime, limit=limit, batch=batch, precision=precision, threads=threads, asked=task
    )


def bench(
    models: Sequence[nn.Module | str] | nn.Module | str, batch: int | Sequence[int] = (1, 8), threads: int = 2,
    runtime: str | Sequence[str] = "openvino", *, precision: str | None = None, rounds: int = 7,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time models side by side in one interleaved run.

    Args:
        models: Modules, MODEL specs or graph files; ratios are against the first.
        batch: One batch size or several.
        threads: Threads.
        runtime: One runtime or several.
        precision: ``f32`` or ``bf16``; default: every precision the CPU runs natively.
        rounds: Interleaved rounds.

    Returns:
        One dictionary per model, runtime, precision and batch: median_ms, iqr_ms, ratio (first / this,
        median of pairs), ratio_best_dense, trusted, reason.
    """
    listed = [models] if isinstance(models, str) or not isinstance(models, Sequence) else list(models)
    runtimes = [runtime] if isinstance(runtime, str) else list(runtime)
    sizes = [batch] if isinstance(batch, int) else list(batch)
    return _import("pipeline.benching").bench(
        listed, batch=sizes, threads=threads, runtimes=runtimes, precision=precision, rounds=rounds
    )


def export(
    model: nn.Module | str, out: str | Path, formats: Sequence[str] | str = ("openvino",), *, int8: bool = False,
    data: Any = None, max_drop: float | None = None, min_speedup: float | None = None, batch: int | str = 1,
) -> dict[str, Any]:  # fmt: skip
    """Export a model with proof: parity with torch, and on request accuracy and speed bounds.

    Args:
        model: A module or MODEL spec.
        out: Folder for the artefacts.
        formats: ``openvino``, ``onnx``.
        int8: Quantize to 8 bits first, calibrated on ``data``.
        data: Images: calibration for ``int8`` and the accuracy bound.
        max_drop: Largest loss of accuracy in points against the model given.
        min_speedup: Least ratio against the best dense precision of the runtime.
        batch: Batch size, or ``"dynamic"``.

    Returns:
        ``artefacts`` (one dictionary a format), ``unmet`` bounds, ``notes`` where layers have no kernel in runtimes.

    Raises:
        RunError: A bound is not met, or parity fails; says by how much.
    """
    wanted = [formats] if isinstance(formats, str) else list(formats)
    if (int8 or max_drop is not None) and data is None:
        raise RecipeError("export: --int8 and --max-drop need images; pass data (folder:PATH, embedded, ...)")
    return _import("pipeline.exporting").export(
        _model(model), Path(out), wanted, int8=int8, data=data, max_drop=max_drop, min_speedup=min_speedup, batch=batch
    )


def upscale(  # noqa: PLR0913 - the public call; all but three are optional
    source: str | Path, target: str | Path, model: nn.Module | str, *, scale: int | None = None, runtime: str = "torch",
    tile: int | None = None, overlap: int | None = None, threads: int = 2, progress: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Enlarge a picture, or every picture of a folder, by a super-resolution model.

    Grey pictures stay grey, transparency is enlarged with bicubic interpolation, CMYK and palettes become RGB,
    16 bits become 8; pictures are turned as their EXIF data say. Of a folder, pictures that cannot be read or written
    are left out and named. Originals are not written over.

    Args:
        source: A picture or a folder.
        target: The picture to write (its ending says the format), or a folder that takes it under its own name.
        model: A module, MODEL spec or graph file for super-resolution.
        scale: The scale expected; refused if the model has another.
        runtime: ``torch``, ``openvino`` or ``onnxruntime``; the last two go in tiles of the graph's size.
        tile: Side of the tiles in torch; default: one piece up to 512 x 512 pixels, tiles of 256 above.
        overlap: Pixels that neighbouring tiles share on each side; default 16, at most a quarter of a tile.
        threads: Threads.
        progress: Say what is done.

    Returns:
        One dictionary a picture: image, out, from and to (width, height), seconds, notes (what was converted). What
        was left out has ``out: None`` and the reason among its notes.

    Raises:
        DataError: Nothing to read, a single picture that cannot be read or written, or one that is its own target.
        ModelError: A model for something else, or one without weights.
        RecipeError: Another scale than the model's, or tiles not larger than their overlaps.
    """
    say = _import("pipeline.progress").say if progress else (lambda text: None)
    return _import("pipeline.upscaling").upscale(
        Path(source), Path(target), model, scale=scale, runtime=runtime, tile=tile, overlap=overlap, threads=threads,
        tick=say,
    )  # fmt: skip


def report(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Write one self-contained HTML page for one run or a comparison of several; returns its path."""
    listed = [Path(runs)] if isinstance(runs, str | Path) else [Path(r) for r in runs]
    return _import("report.build").build_report(listed, Path(out) if out else listed[0] / "report.html")


def doctor() -> dict[str, Any]:
    """Return versions, CPU features, runtimes and kernels; what is missing and how to get it."""
    return _import("pipeline.doctor").doctor()
