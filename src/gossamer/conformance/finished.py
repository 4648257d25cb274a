"""Checks of what a method leaves behind: replay, saved model, exported graph."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gossamer.conformance.running import differing, example_batch, outputs, replayed, require, run
from gossamer.core import registry
from gossamer.core.errors import RecipeError
from gossamer.export.exporting import export
from gossamer.kits.example import MethodExample
from gossamer.models.store import load, save
from gossamer.runtimes import get

__all__ = ["check_export", "check_replay", "check_saved"]

TRAINING_CODE = ("gossamer.engine", "gossamer.pipeline", "gossamer.conformance", "accelerate")


def check_replay(example: MethodExample) -> None:
    """The edit log alone, read back from JSON, rebuilds the finished structure; weights then give equal outputs."""
    done, batch = run(example), example_batch(example)
    model, stack = replayed(example, done.stack.edits)
    require(stack.edits == done.stack.edits, "replay: the replayed log differs from the original")
    ours, theirs = model.state_dict(), done.model.state_dict()
    odd = sorted(
        k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or ours[k].shape != theirs[k].shape
    )
    require(not odd, f"replay: the rebuilt model differs from the finished one in {odd[:3]}")
    model.load_state_dict(theirs)
    gap = (outputs(model, batch) - outputs(done.model, batch)).abs().max().item()
    require(gap == 0, f"replay: outputs differ by {gap:.2g}")


def _is_registered(example: MethodExample) -> bool:
    try:
        return registry.find(registry.name_of(example.method())) is type(example.method())
    except RecipeError:
        return False


def check_saved(example: MethodExample) -> None:
    """A saved model loads in a process that cannot import training code, and gives equal outputs."""
    done, batch = run(example), example_batch(example)
    if done.stack.lasting_edits() and not _is_registered(example):
        require(False, f"{type(example.method()).__name__} leaves lasting edits; register its room so that models load")
    expected = outputs(done.model, batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(done.model, folder / "model", stack=done.stack)
        again = load(folder / "model")
        odd = differing(again, done.model)
        require(not odd, f"saved model: {odd[:3]} are not as saved")
        require(torch.equal(outputs(again, batch), expected), "saved model: outputs differ after loading")
        if not done.stack.lasting_edits():
            return  # a plain timm model: nothing of the method is needed to load it
        save_file({"image": batch["image"]}, folder / "in.safetensors")
        code = (
            "import sys\n"
            f"for name in {TRAINING_CODE!r}: sys.modules[name] = None\n"
            "import torch; from safetensors.torch import load_file, save_file\n"
            "from gossamer.models.store import load\n"
            "torch.set_num_threads(1); folder = sys.argv[1]; model = load(folder + '/model')\n"
            "with torch.no_grad(): out = model(load_file(folder + '/in.safetensors')['image'])\n"
            "save_file({'out': out.contiguous()}, folder + '/out.safetensors')\n"
        )
        child = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
        require(child.returncode == 0, f"saved model does not load without training code: {child.stderr[-400:]}")
        gap = (load_file(folder / "out.safetensors")["out"] - expected).abs().max().item()
        require(gap <= 1e-5 * float(expected.abs().max()), f"saved model: outputs elsewhere differ by {gap:.2g}")


def check_export(example: MethodExample) -> None:
    """The finished model exports to ONNX and gives the same outputs in ONNX Runtime."""
    done, batch = run(example), example_batch(example)
    expected = outputs(done.model, batch).numpy()
    with tempfile.TemporaryDirectory() as name:
        images = batch["image"]
        artefact = export(done.model, Path(name) / "onnx", format="onnx", batch=len(expected), example=images)
        got = get("onnxruntime").load(artefact.graph).run(images.numpy())
    # the export's own bound: for 8-bit layers it follows from how far rounding carries in this model
    allowed = max(example.tolerance, artefact.parity["tolerance"])
    gap = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    require(gap <= allowed, f"export: outputs differ by {gap:.2g} of their size; allowed {allowed:.2g}")
