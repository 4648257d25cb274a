"""Optimisers: one per parameter group and phase, state kept for parameters that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

from gossamer.core.errors import PlanError, StateError
from gossamer.core.schedule import Phase
from gossamer.recipe import TrainSettings

__all__ = ["Optimisers", "rate_factor"]

Groups = Mapping[str, list[nn.Parameter]]
_LEFT = {"cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)), "linear": lambda done: 1 - done}
"""What is left of the fall of a rate, by the share of it that is done."""


def rate_factor(phase: Phase, index: int) -> float:
    """Return learning rate over base rate at a step: linear warm-up, held for a while, then cosine, linear or constant.

    A part of a longer training (``Phase.window``) has the rates of its place in the whole.

    Raises:
        PlanError: The phase names an unknown schedule.
    """
    steps = phase.steps
    if phase.window is not None:
        index, steps = phase.window.offset + index, phase.window.total
    warm = round(phase.warmup * steps)
    if index < warm:
        return (index + 1) / (warm + 1)
    if phase.schedule == "constant":
        return 1.0
    if phase.schedule not in _LEFT:
        raise PlanError(f"phase {phase.name!r}: schedule={phase.schedule!r}; allowed are constant, {', '.join(_LEFT)}")
    flat = warm + round(phase.hold * (steps - warm))
    done = max(0, index - flat) / max(1, steps - flat)
    return phase.min_lr_ratio + (1 - phase.min_lr_ratio) * _LEFT[phase.schedule](done)


def _weight_groups(model: nn.Module, params: list[nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """Split weights into decayed and not decayed (biases, norms, what the model exempts), by layer if asked."""
    exempting = getattr(model, "no_weight_decay", None)  # timm's contract
    exempt: set[str] = set(exempting()) if callable(exempting) else set()
    mine = {id(p) for p in params}
    if settings.layer_decay is not None:
        split = param_groups_layer_decay(
            model, settings.weight_decay, no_weight_decay_list=tuple(exempt), layer_decay=settings.layer_decay
        )
        groups = [{**g, "params": [p for p in g["params"] if id(p) in mine]} for g in split]
        return [{k: v for k, v in g.items() if k != "param_names"} for g in groups if g["params"]]
    names = {id(p): n for n, p in model.named_parameters()}
    plain = [p for p in params if p.ndim <= 1 or names.get(id(p), "") in exempt]
    small = {id(p) for p in plain}
    decayed = [p for p in params if id(p) not in small]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


class Optimisers:
    """The optimisers of a run, by group.

    Ordinary weights get the recipe's decay; groups that methods name get none.

    Args:
        settings: Optimiser, base learning rate, weight and layer decay.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._names: dict[nn.Parameter, str] = {}
        self._memory: dict[nn.Parameter, dict[str, Any]] = {}
        self._counters: dict[str, list[dict[str, Any]]] = {}
        self._keys: dict[str, set[str]] = {}
        self.active: dict[str, torch.optim.Optimizer] = {}

    def enter(
        self,
        model: nn.Module,
        phase: Phase,
        groups: Groups,
        names: Mapping[nn.Parameter, str],
        *,
        fresh: bool = False,
    ) -> None:
        """Make the optimisers of a phase; known parameters keep their state, vanished ones lose it.

        Args:
            model: Model in the structure of the phase.
            phase: The phase.
            groups: Parameters by group.
            names: Name of every parameter of the model and of the methods' networks.
            fresh: Forget the state of the groups that the phase trains.

        Raises:
            PlanError: The phase trains a group that does not exist, is empty, or whose parameters belong to nobody.
        """
        self._collect()
        self._names = dict(names)
        self._memory = {p: s for p, s in self._memory.items() if p in self._names}
        if fresh:
            trained = {g for t in phase.turns for g in t.trains}
            forgotten = {id(p) for g in trained for p in groups.get(g, ())}
            self._memory = {p: s for p, s in self._memory.items() if id(p) not in forgotten}
            self._counters = {g: c for g, c in self._counters.items() if g not in trained}
        self.active = {}
        for group in dict.fromkeys(g for t in phase.turns for g in t.trains) if phase.work is None else ():
            if group not in groups:
                raise PlanError(f"phase {phase.name!r} trains group {group!r}; groups are {sorted(groups)}")
            params = [p for p in groups[group] if p.requires_grad]
            if not params:
                raise PlanError(f"phase {phase.name!r} trains group {group!r}, which has no trainable parameter")
            if any(p not in self._names for p in params):
                raise PlanError(f"group {group!r}: parameters must be part of the model or of the method's extra")
            lr, own = (phase.lr or {}).get(group, self._settings.lr), (phase.optimizer or {}).get(group)
            self.active[group] = self._make(model, group, params, lr, own)

    def follow(self, names: Mapping[nn.Parameter, str]) -> None:
        """Take the names after a structural change, so that what vanished is not written to a checkpoint."""
        self._names = dict(names)

    def _make(
        self, model: nn.Module, group: str, params: list[nn.Parameter], lr: float, own: Mapping[str, Any] | None
    ) -> torch.optim.Optimizer:
        options = {"opt": self._settings.optimizer, "weight_decay": 0.0, **(own or {})}
        ordinary = group == "weights" and own is None
        split = _weight_groups(model, params, self._settings) if ordinary else [{"params": params}]
        opt = create_optimizer_v2(split, lr=lr, **options)
        for pg in opt.param_groups:
            pg["base_lr"] = lr * pg.get("lr_scale", 1.0)
        self._keys[group] = {k for pg in opt.param_groups for k in pg}
        for p in params:
            if p in self._memory:
                opt.state[p] = {k: _placed(k, v, p) for k, v in self._memory.pop(p).items()}
        counters = self._counters.pop(group, [])
        if len(counters) == len(opt.param_groups):
            for pg, extra in zip(opt.param_groups, counters, strict=True):
                pg.update(extra)
        return opt

    def _collect(self) -> None:
        for group, opt in self.active.items():
            self._memory.update({p: dict(s) for p, s in opt.state.items() if isinstance(p, nn.Parameter)})
            self._counters[group] = [
                {k: v for k, v in pg.items() if k not in self._keys[group]} for pg in opt.param_groups
            ]

    def set_rates(self, phase: Phase, index: int, trains: Iterable[str]) -> dict[str, float]:
        """Set the learning rates of a step; returns the rate of each group (its highest layer's)."""
        factor = rate_factor(phase, index)
        rates = {}
        for group in trains:
            for pg in self.active[group].param_groups:
                pg["lr"] = pg["base_lr"] * factor
            rates[group] = max(pg["lr"] for pg in self.active[group].param_groups)
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return all states by parameter name."""
        self._collect()
        return {
            "parameters": {self._names[p]: dict(s) for p, s in self._memory.items() if p in self._names},
            "counters": {g: [dict(c) for c in cs] for g, cs in self._counters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> None:
        """Restore what ``state_dict`` returned; call before ``enter``.

        Raises:
            StateError: The state belongs to a parameter that is not there.
        """
        by_name = {n: p for p, n in names.items()}
        for name, values in state["parameters"].items():
            if name not in by_name:
                raise StateError(
                    f"optimiser state of {name!r}: the model has no such parameter; resume with the model it belongs to"
                )
            self._memory[by_name[name]] = dict(values)
        self._counters = {g: [dict(c) for c in cs] for g, cs in state["counters"].items()}


def _placed(key: str, value: Any, param: nn.Parameter) -> Any:
    """Return an optimiser state entry on its parameter's device (step counts stay where torch keeps them)."""
    return value.to(param.device) if isinstance(value, Tensor) and key != "step" else value
