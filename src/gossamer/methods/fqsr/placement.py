"""Which convolutions and additions of a network carry intervals, and which parts stay in float."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.errors import ModelError
from gossamer.cost.ledger import cost
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.quant_layout import unfit_padding

__all__ = ["Placement", "find_placement"]

_FLOAT = (nn.PReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.GELU, nn.SiLU)
"""Functions that read rounded values and are computed in float."""


@dataclass(frozen=True)
class Placement:
    """Where intervals go.

    Attributes:
        convs: Convolutions in order: MACs for one image (0: not known), whether the input is rounded (``"half"``,
            ``"full"`` or ``"float"``) and whether the output is.
        adds: Additions in order.
        norms: ``[convolution, batch norm]`` to fold before.
        spare: Convolutions whose output is rounded by its readers too.
        ties: ``[addition, convolution]``: the convolution reads a value that the addition reads.
        islands: What stays in float, with the reason.
    """

    convs: dict[str, dict[str, Any]]
    adds: list[str]
    norms: list[list[str]] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    ties: list[list[str]] = field(default_factory=list)
    islands: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Placement:
        """Undo ``to_json``."""
        return cls(**data)


def _check(model: nn.Module) -> list[str]:
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "weight_bits"):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: the model is quantized already; pass the float one"
            )
        if type(module) is nn.Conv2d:
            if (why := unfit_padding(module)) is not None:
                raise ModelError(
                    f"fqsr: convolution {name!r} has {why}; every one is to be quantized, allowed is a number of zeros"
                )
            names.append(name)
    if len(names) < 2:
        raise ModelError(
            f"fqsr: {type(model).__name__} has {len(names)} convolutions; expected a convolutional network with a "
            f"first and a last one at least"
        )
    return names


def find_placement(
    model: nn.Module, *, ranges: str = "auto", skips: str = "all", fold: bool = True, outputs: bool = True
) -> Placement:
    """Look at a float network.

    Args:
        model: A network that ``torch.fx`` can trace, its additions ``ops.sums.Add`` modules.
        ranges: ``"auto"``: inputs that cannot be negative in ``[0, c]``; ``"half"`` or ``"full"``: all.
        skips: ``"all"`` additions, all but the last (``"body"``, as released for EDSR), or ``"none"``.
        fold: Fold batch norms that alone read a convolution.
        outputs: Round outputs of convolutions.

    Raises:
        ModelError: Not a convolutional network, quantized already, or additions that no module makes.
    """
    convs = _check(model)
    flow = Dataflow(model)
    adds, loose = flow.sums()
    if loose and skips != "none":
        raise ModelError(
            f"fqsr: {len(loose)} additions of {type(model).__name__} are no modules ({', '.join(loose[:3])}); write "
            f"them as gossamer.ops.sums.Add, or leave skip connections in float with skips: none"
        )
    kept = [] if skips == "none" else adds[:-1] if skips == "body" else adds
    first, last = flow.ends(convs)
    unsigned = set(flow.unsigned_inputs(convs)) if ranges == "auto" else set(convs) if ranges == "half" else set()
    macs = _macs(model)
    norms = flow.norms if fold else []
    readers = {*convs, *kept} - set(first)
    table = {
        n: {
            "macs": macs.get(n, 0),
            "input": "float" if n in first else "half" if n in unsigned else "full",
            "output": outputs and n not in last,
        }
        for n in convs
    }
    return Placement(
        convs=table,
        adds=kept,
        norms=norms,
        spare=[n for n in convs if table[n]["output"] and flow.read_by(n, readers)],
        ties=_ties(flow, [c for c in convs if c not in first], kept),
        islands=_islands(model, first, last, [a for a in adds if a not in kept] + loose, norms),
    )


def _macs(model: nn.Module) -> dict[str, int]:
    """Return the MACs of one image by layer; none of a model that does not state its input size."""
    try:
        return {row.name: row.macs for row in cost(model, saved=False).per_layer}
    except ModelError:
        return {}


def _ties(flow: Dataflow, convs: Collection[str], adds: Collection[str]) -> list[list[str]]:
    by_value = {value: add for add, values in reversed(flow.reads(adds).items()) for value in values}
    return [[by_value[v[0]], conv] for conv, v in flow.reads(convs).items() if len(v) == 1 and v[0] in by_value]


def _islands(
    model: nn.Module, first: list[str], last: list[str], adds: list[str], norms: list[list[str]]
) -> dict[str, str]:
    folded = {name for _, name in norms}
    found = {f"input of {n}": "the picture itself" for n in first}
    found |= {f"output of {n}": "what is returned" for n in last}
    found |= {a: "an addition left in float" for a in adds}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and name not in folded:
            found[name] = "a batch norm, computed in float between integer layers"
        elif isinstance(module, _FLOAT):
            found[name] = f"{type(module).__name__}: reads rounded values, computes in float"
    return found
