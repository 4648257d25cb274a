"""Mesa: A Memory-saving Training Framework for Transformers (arXiv 2111.11124).

Written from the paper's formulas. Reference: zhuang-group/Mesa at 8b7a0db (Apache-2.0; used as an oracle only).
Ours: any bits up to 8, both sides clipped, one copy of the attention probabilities, grids kept per call, ranges
frozen while a checkpointed forward is repeated, CPU kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from gossamer.core.errors import ModelError, RecipeError
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Loader, Phase, Step
from gossamer.methods.mesa.layers import is_packed, packs, plain, stores
from gossamer.methods.mesa.policy import (
    KINDS,
    Groups,
    Policy,
    choose,
    classes_by_name,
    packed_attention,
    saved_per_image,
)
from gossamer.models.contracts import replace_module
from gossamer.models.timm_adapter import close_attention, open_attention
from gossamer.ops.act_store import ActStore, NoiseSource
from gossamer.ops.attention import MatMul

__all__ = ["Mesa"]


@dataclass
class Mesa(Method):
    """Training with exact forward passes and saved activations in bytes.

    Layers pack while a phase trains; between phases and in phases of other work the model is the plain one, so
    that growth, pruning and the like see nothing unusual. A layer they add packs from the next phase on.

    Attributes:
        bits: Width of a saved activation, 2..8 (a byte each), or 32 to keep everything exact.
        grouping: ``"heads"`` (head-wise: channels and heads are cut like the nearest attention), a number, or
            ``{"channels": 32}`` (attention: heads). Where it does not divide, the greatest common divisor.
        ema: Share of the earlier range in a running range (lambda).
        rounding: ``"stochastic"`` or ``"nearest"``.
        kinds: Kinds of layers that pack.
        include: Patterns of module paths, one of which a layer must match.
        exclude: Patterns of module paths that a layer must not match.
        save_softmax_input: Keep the softmax's input too and its output twice, as the release does.
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"gradients"})

    bits: int = 8
    grouping: Groups = "heads"
    ema: float = 0.9
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    kinds: tuple[str, ...] = KINDS
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("*patch_embed*",)
    save_softmax_input: bool = False
    _noise: NoiseSource = field(default_factory=NoiseSource, init=False, repr=False)
    _live: dict[str, ActStore] = field(default_factory=dict, init=False, repr=False)
    _ranges: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _facts: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    # -- packing layers in, plain layers back ----------------------------------------------------
    def prepare(self, model: nn.Module) -> None:
        """Check that something is to pack; layers change when a training phase is entered.

        Raises:
            RecipeError: An option is out of range.
            ModelError: No layer of the model is to pack.
        """
        self._store(1, -1)  # refuses bits and ema out of range
        self._policy().check()
        edit = choose(model, self._policy())
        if not edit["packed"]:
            raise ModelError(
                f"mesa on {type(model).__name__}: no layer of kinds {', '.join(self.kinds)} matches include="
                f"{list(self.include)} and exclude={list(self.exclude)}; left exact are {edit['exact'] or 'none'}"
            )

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Pack what trains; work that is no training sees the plain model."""
        if phase.work is not None:
            return self.finish(model)
        edit = choose(model, self._policy())
        return edit if edit["packed"] else None

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Give the plain model to whatever changes it next."""
        return self.finish(model)

    def finish(self, model: nn.Module) -> Edit | None:
        """Put the plain layers back."""
        if not any(map(is_packed, model.modules())):
            return None
        return {"plain": True, "close": packed_attention(model)}

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Exchange layers; ranges are kept by path over a time of plain layers."""
        if edit.get("plain"):
            self._ranges |= {path: store.saved_state() for path, store in self._live.items()}
            for path, module in list(model.named_modules()):
                if is_packed(module):
                    replace_module(model, path, plain(module))
            for path in edit["close"]:
                close_attention(model, path)
            self._live = {}
            return model
        before = None if self._facts else saved_per_image(model)
        for path in edit["opened"]:
            open_attention(model, path)
        device = next((p.device for p in model.parameters()), None)
        for path, entry in edit["packed"].items():
            cls = classes_by_name()[entry["class"]]
            kept = [self._store(entry["groups"], entry["dim"]).to(device) for _ in range(self._number(cls))]
            replace_module(model, path, packs(model.get_submodule(path), cls, kept))
        self._live = dict(stores(model))
        for path, store in self._live.items():
            if store.seen == 0 and path in self._ranges:
                store.load_saved_state(self._ranges[path])
        kinds = [entry["class"] for entry in edit["packed"].values()]
        if not self._facts:
            self._facts = {
                "packed_layers": {k: kinds.count(k) for k in dict.fromkeys(kinds)},
                "left_exact": edit["exact"],
                "saved_bytes_per_image": {"plain": before, "packed": saved_per_image(model)},
            }
        return model

    # -- step ------------------------------------------------------------------------------------
    def loader(self, name: str, loader: Loader) -> Loader:
        """Number the roundings of a step from the step: what comes before every forward pass is its batch."""

        def draw(step: Step) -> Batch:
            self._noise.begin(step.key("mesa", per_rank=True))
            return loader(step)

        return draw

    # -- report and state ------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return how many layers of each class packed, what was left exact, and the bytes saved for it (fp32)."""
        return {"facts": {"bits": self.bits, **self._facts}} if self._facts else {}

    def state_dict(self) -> dict[str, Any]:
        """Return every running range with its count, and the number of the next rounding."""
        live = {path: store.saved_state() for path, store in self._live.items()}
        return {"ranges": {**self._ranges, **live}, "noise": [self._noise.key, self._noise.calls]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._ranges = dict(state["ranges"])
        self._noise.key, self._noise.calls = state["noise"]
        for path, store in self._live.items():
            store.load_saved_state(self._ranges[path])

    def _policy(self) -> Policy:
        return Policy(self.kinds, self.include, self.exclude, self.grouping)

    def _store(self, groups: int, dim: int) -> ActStore:
        if self.rounding not in ("stochastic", "nearest"):
            raise RecipeError(f"mesa: rounding={self.rounding!r}; allowed are 'stochastic' and 'nearest'")
        return ActStore(groups, dim, self.bits, self.ema, self._noise if self.rounding == "stochastic" else None)

    def _number(self, cls: type[nn.Module]) -> int:
        if cls in (nn.ReLU, nn.ReLU6):
            return 0
        return 2 if cls is MatMul or (cls is nn.Softmax and self.save_softmax_input) else 1
