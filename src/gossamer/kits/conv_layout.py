"""Where a convolutional network is quantized: its layers, the norms that go into them, and its sums.

Integer kernels follow one another only if what lies between two of them is rounded too: the operands of
residual sums, what several layers read, what pooling averages. ``find_conv_layout`` names these places,
``round_outputs`` puts grids there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.kits.calibration import Observe, TopMagnitudes, Walk
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.quant_layout import Layout, classifiers, unfit_padding
from gossamer.ops.grids import InputGrid
from gossamer.ops.quant import max_scale

__all__ = ["find_conv_layout", "measure_sums", "round_outputs"]


def find_conv_layout(model: nn.Module) -> Layout:
    """Find the layers to quantize in a convolutional network, and the batch norms to fold before.

    Args:
        model: A float model that ``torch.fx`` can trace.

    Raises:
        ModelError: No convolution, or a model that cannot be traced.
    """
    units: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d):
            continue
        reason = unfit_padding(module) if isinstance(module, nn.Conv2d) else None
        if reason:
            skipped[name] = reason
        else:
            units[name] = [name]
    if not any(isinstance(model.get_submodule(n), nn.Conv2d) for n in units):
        raise ModelError(f"{type(model).__name__} holds no convolution that can be quantized ({skipped or 'none'})")
    flow = Dataflow(model)
    sums, lost = flow.open_tensors(units)
    return Layout(
        attentions=(),
        units=units,
        heads=tuple(sorted(classifiers(model) & units.keys())),
        modules={n: [n] for n in units},
        skipped={**skipped, **{where: "a sum or shared value that no module returns" for where in lost}},
        norms=flow.norms,
        unsigned=flow.unsigned_inputs(units),
        sums=sums,
    )


@torch.no_grad()
def measure_sums(walk: Walk, kinds: Mapping[str, str], percentile: float = 100.0) -> dict[str, dict[str, Any]]:
    """Return 8-bit grids, as ``round_outputs`` takes them, from what modules return for the images of a walk.

    Args:
        walk: Images and model.
        kinds: ``"signed"`` or ``"unsigned"`` by module path (``Layout.sums``, ``Dataflow.open_tensors``).
        percentile: Magnitude on the largest code.
    """
    tops = {n: TopMagnitudes(percentile, len(walk.batches[0]) / walk.num_images) for n in kinds}

    def observer(name: str) -> Observe:
        return lambda inputs, out, batch: tops[name].add(out)  # type: ignore[arg-type]

    if kinds:
        walk.run({n: observer(n) for n in kinds}, outputs=True)
    steps = {n: float(max_scale(top.value(), 8, kinds[n] == "signed")) for n, top in tops.items()}
    return {n: {"bits": 8, "kind": kinds[n], "step": step} for n, step in steps.items()}


def _round_output(module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return module.output_grid(out)


def round_outputs(model: nn.Module, grids: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put grids on what modules return, in place.

    Each grid becomes the submodule ``output_grid`` of its module, so that it is saved and exported.

    Args:
        model: The model, its layers in their final form.
        grids: ``{"bits", "kind", "step"}`` by module path, as ``InputGrid`` takes them; a model that is
            built to be filled from a file may leave out the step.

    Raises:
        ModelError: A path is missing, or a grid that cannot be held.
    """
    for name, grid in grids.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"rounding the output of {name!r}: no such module; quantize the finished model") from None
        new = InputGrid(int(grid["bits"]), grid["kind"])
        if "step" in grid:
            new.fill(f"output of {name!r}", grid["step"])
        device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        if not hasattr(module, "output_grid"):
            module.register_forward_hook(_round_output)
        module.add_module("output_grid", new.to(device))
    return model
