"""The protocol that every method follows: one dataclass, every hook optional."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn

from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Terms

__all__ = ["STAGES", "Edit", "Evaluate", "Grads", "Method"]

STAGES = ("growth", "structure", "tokens", "training", "precision")
"""Order in which the methods of a stack are prepared and finished."""

Edit = dict[str, Any]
"""A structural change as plain JSON: decided once, logged, replayed on resume and on load."""
Grads = Callable[[nn.Module, Batch, Step, list[nn.Parameter]], dict[str, Any]]
"""Fills ``.grad`` of the given parameters; returns the detached loss terms."""
Evaluate = Callable[[nn.Module, Batch, Step], Terms]


class Method:
    """Base of all methods. Subclass as a dataclass whose fields are the hyper-parameters.

    Fields are stored unchanged and never reassigned; the constructor does no work, so that a
    saved model can rebuild the method from its JSON options and replay its edits. What a method
    learns by looking at a model belongs in an edit; training-only state goes through
    ``state_dict``.

    Class attributes:
        stage: One of ``STAGES``; default order in a stack.
        touches: What the method changes: ``"tokens"``, ``"structure"``, ``"precision"``
            (these three last: they are part of a saved model), ``"weights"``, ``"loss"``,
            ``"gradients"``, ``"adversary"`` (the discriminator that the model is trained against). Two
            methods of a stack may not both touch ``"precision"``, ``"tokens"`` or ``"adversary"``.
        needs: ``{touched: gift}``: if another method of the stack touches ``touched``, some
            method must give ``gift``.
        gives: Capabilities this method offers to others.
        wraps: Group whose turns ``wrap_grads`` concerns.
        extra: Networks the method owns (teacher under training, discriminator, controller).
    """

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[Mapping[str, str]] = {}
    gives: ClassVar[frozenset[str]] = frozenset()
    wraps: ClassVar[str] = "weights"
    extra: nn.ModuleDict | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}  # options may be modules

    # -- structure: decide (return plain JSON), then do it deterministically ---------------------
    def prepare(self, model: nn.Module) -> Edit | None:
        """Decide the first change, before any phase. Raise ``ModelError`` if unsupported."""
        return None

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Decide a change at the start of ``phase``."""
        return None

    def leave(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Decide a change at the end of ``phase``."""
        return None

    def finish(self, model: nn.Module) -> Edit | None:
        """Decide the last change: make the saving physical."""
        return None

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Carry out an edit that one of the four hooks above returned."""
        raise NotImplementedError(f"{type(self).__name__} returned an edit but does not define apply")

    # -- schedule and data -----------------------------------------------------------------------
    def phases(self, plan: Plan) -> Plan:
        """Add or reshape phases. Called after ``prepare`` (or after its replay)."""
        return plan

    def loader(self, name: str, loader: Loader) -> Loader:
        """Wrap the loader called ``name``."""
        return loader

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Name the parameters that are not ordinary weights. They must be part of ``model`` or ``extra``."""
        return {}

    # -- step ------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        """Return extra weighted terms; a term named ``"task"`` replaces the task's own."""
        return {}

    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """Wrap anything around "fill .grad": two passes, zeroth order, sandwich sampling."""
        return grads

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Gradients are complete and averaged over ranks."""

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Parameters have been updated."""

    # -- evaluation and report -------------------------------------------------------------------
    def variants(self, model: nn.Module) -> dict[str, AbstractContextManager[None]]:
        """Return named contexts under which the task also evaluates."""
        return {}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return JSON for the report: ``{"tables": [...], "facts": {...}, "tokens": {...}}``."""
        return {}

    # -- state -----------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return all training-only state (tensors, numbers, strings, lists, dicts)."""
        return {} if self.extra is None else {"extra": self.extra.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
