"""Small methods that between them use every hook, and the model, data and loop to run them with."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Plan, Step, Turn
from gossamer.core.stack import Stack
from gossamer.engine.loop import Loop, RunOptions
from gossamer.recipe import TrainSettings


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    def __init__(self, depth: int = 3, classes: int = 4, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x.mean(1))))


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options)


class Task:
    def loss(self, model, batch):
        out = model(batch["image"])
        return out, {"task": F.cross_entropy(out, batch["target"])}


@dataclass
class Data:
    """Batches of 16, sliced by the rank of the step or by ``rank``; a signal comes before draw ``stop_at``."""

    world: int = 1
    rank: int | None = None
    stop_at: int | None = None
    number: int = signal.SIGINT
    drawn: int = 0

    def __call__(self, step: Step) -> dict[str, Any]:
        self.drawn += 1
        if self.drawn == self.stop_at:
            os.kill(os.getpid(), self.number)
        generator = torch.Generator().manual_seed(1000 + step.index)
        x = torch.randn(16, 6, 8, generator=generator)
        y = (x.mean((1, 2)) * 20).long().clamp(-2, 1) + 2
        mine = slice(step.rank if self.rank is None else self.rank, None, self.world)
        return {"image": x[mine], "target": y[mine], "id": [f"{step.index}-{n}" for n in range(16)][mine]}


@dataclass
class TwoPass(Method):
    """Sharpness-aware: ascend, evaluate, restore from copies."""

    rho: float = 0.05

    def wrap_grads(self, grads, evaluate):
        def two_pass(model, batch, step, params):
            logs = grads(model, batch, step, params)
            held = [p for p in params if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
            with torch.no_grad():
                old = [p.clone() for p in held]
                for p in held:
                    p.add_(p.grad * (self.rho / norm))
            for p in params:
                p.grad = None
            grads(model, batch, step, params)
            with torch.no_grad():
                for p, o in zip(held, old, strict=True):
                    p.copy_(o)
            return logs

        return two_pass


@dataclass
class ZerothOrder(Method):
    mu: float = 1e-2

    def wrap_grads(self, grads, evaluate):
        @torch.no_grad()
        def spsa(model, batch, step, params):
            generator = step.generator("spsa")
            noise = [torch.randn(p.shape, generator=generator) for p in params]
            old = [p.clone() for p in params]
            values = []
            for sign in (1, -1):
                for p, o, u in zip(params, old, noise, strict=True):
                    p.copy_(o + sign * self.mu * u)
                values.append(evaluate(model, batch, step))
            for p, o, u in zip(params, old, noise, strict=True):
                p.copy_(o)
                p.grad = (sum(values[0].values()) - sum(values[1].values())) / (2 * self.mu) * u
            return values[0]

        return spsa


@dataclass
class Duel(Method):
    """Alternating turns: a discriminator of its own, trained at every second step."""

    extra: nn.ModuleDict = field(default_factory=lambda: nn.ModuleDict({"disc": nn.Linear(4, 1)}), init=False)

    def groups(self, model):
        return {"disc": list(self.extra["disc"].parameters())}

    def phases(self, plan):
        turn = Turn("disc", ("disc",), self.disc_loss, every=2)
        return plan.swap("fit", lambda p: [replace(p, turns=(turn, *p.turns))])

    def disc_loss(self, model, batch, step):
        with torch.no_grad():
            fake = model(batch["image"])
        real = F.one_hot(batch["target"], 4).float()
        disc = self.extra["disc"]
        return {"disc": F.softplus(-disc(real)).mean() + F.softplus(disc(fake)).mean()}

    def loss(self, model, batch, out, step):
        return {"adv": F.softplus(-self.extra["disc"](out)).mean()}


@dataclass
class Grow(Method):
    """A block more at half time, in the middle, so that others change their names."""

    fresh: bool = False

    def phases(self, plan):
        def halves(p):
            grown = p.part("fit.grown", p.steps // 2, p.steps - p.steps // 2)
            return [p.part("fit.small", 0, p.steps // 2), replace(grown, fresh=self.fresh)]

        return plan.swap("fit", halves)

    def enter(self, model, phase):
        return {"clone": len(model.blocks) - 1} if phase.name.endswith(".grown") else None

    def apply(self, model, edit):
        new = Block()
        new.load_state_dict(model.blocks[edit["clone"]].state_dict(), strict=False)
        model.blocks.insert(edit["clone"], new)
        return model


@dataclass
class NMask(Method):
    """2:4 masks after every step."""

    def __post_init__(self):
        self.names = []

    def _find(self, model):
        names = [n for n, _ in model.named_parameters() if n.endswith("fc.weight")]
        return {"names": names} if names != self.names else None

    def prepare(self, model):
        return self._find(model)

    def enter(self, model, phase):
        return self._find(model)

    def apply(self, model, edit):
        self.names = edit["names"]
        return model

    @torch.no_grad()
    def after_step(self, model, step):
        for name in self.names:
            groups = model.get_parameter(name).view(-1, 4)
            groups.mul_(torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, 1).indices, 1.0))


class Gate(nn.Module):
    """Soft or hard number of tokens; the rates are a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(5))
        self.keep = 6
        self.soft = False

    def forward(self, x):
        if self.soft:
            kept = self.theta.softmax(0).flip(0).cumsum(0).flip(0)
            return x * torch.cat([kept.new_ones(1), kept])[None, :, None]
        return x[:, : self.keep]


@dataclass
class TokenRates(Method):
    """Search over a frozen model, derive, fine-tune; the gate lives in the model."""

    stage = "tokens"
    touches = frozenset({"tokens"})
    lr: float = 0.1

    def prepare(self, model):
        return {"at": 1}

    def enter(self, model, phase):
        return {"soft": True} if phase.name == "rates.search" else None

    def leave(self, model, phase):
        if phase.name != "rates.search":
            return None
        return {"keep": 1 + int((model.blocks[1].theta.softmax(0) * torch.arange(1, 6)).sum().ceil())}

    def apply(self, model, edit):
        if "at" in edit:
            model.blocks.insert(edit["at"], Gate())
        model.blocks[1].soft = edit.get("soft", False)
        model.blocks[1].keep = edit.get("keep", model.blocks[1].keep)
        return model

    def groups(self, model):
        return {"arch": [model.blocks[1].theta]}

    def phases(self, plan):
        return plan.before("fit", Phase("rates.search", 4, (Turn(trains=("arch",)),), lr={"arch": self.lr}))

    def loss(self, model, batch, out, step):
        if not model.blocks[1].soft:
            return {}
        return {"cost": 0.1 * (model.blocks[1].theta.softmax(0) * torch.arange(5.0)).sum()}


@dataclass
class Average(Method):
    """A method's own moving average, kept in its state and offered as a variant."""

    def __post_init__(self):
        self.average = {}

    @torch.no_grad()
    def after_step(self, model, step):
        for n, p in model.named_parameters():
            self.average[n] = p.clone() if n not in self.average else self.average[n].lerp(p, 0.1)

    def state_dict(self):
        return {"average": dict(self.average)}

    def load_state_dict(self, state):
        self.average = dict(state["average"])


@dataclass
class LayerRate(Method):
    """Scales finished gradients by a running score."""

    def __post_init__(self):
        self.score = None

    def before_step(self, model, step):
        grad = model.head.weight.grad
        if grad is None:
            return
        new = (grad * model.head.weight).detach().abs()
        self.score = new + (0.9 * self.score if self.score is not None else 0)
        grad.mul_(0.2 * grad.numel() ** 0.5 / (self.score.norm() + grad.norm() + 1e-12))

    def state_dict(self):
        return {"score": self.score}

    def load_state_dict(self, state):
        self.score = state["score"]


@dataclass
class Calibrate(Method):
    """Block by block, no training."""

    stage = "precision"

    def __post_init__(self):
        self.scale = []

    def phases(self, plan):
        return Plan((*plan, Phase("calibrate.blocks", 3, work=self.block)))

    @torch.no_grad()
    def block(self, model, loaders, step):
        seen = []
        hook = model.blocks[step.index].register_forward_hook(lambda m, i, o: seen.append(float(o.abs().max())))
        model(loaders["train"](step)["image"])
        hook.remove()
        self.scale.append(seen[0])
        return {"scale": seen[0]}

    def leave(self, model, phase):
        return {"scale": self.scale} if phase.name == "calibrate.blocks" else None

    @torch.no_grad()
    def apply(self, model, edit):
        model.head.weight.mul_(1 + sum(edit["scale"]) / 100)
        return model

    def state_dict(self):
        return {"scale": list(self.scale)}

    def load_state_dict(self, state):
        self.scale = list(state["scale"])


@dataclass
class Until(Method):
    def phases(self, plan):
        return plan.swap("fit", lambda p: [replace(p, until=lambda m: float(m.head.weight.detach()[0, 0]) < -0.305)])


@dataclass
class Cycles(Method):
    """Alternating phases whose optimisers sleep and wake."""

    extra: nn.ModuleDict = field(default_factory=lambda: nn.ModuleDict({"aux": nn.Linear(4, 4)}), init=False)

    def groups(self, model):
        return {"aux": list(self.extra["aux"].parameters())}

    def phases(self, plan):
        def cycle(p):
            aux = (Turn("aux", ("aux",), self.aux_loss),)
            return [
                q for k in range(2) for q in (Phase(f"fit.aux{k}", 2, aux), replace(p, name=f"fit.main{k}", steps=2))
            ]

        return plan.swap("fit", cycle)

    def aux_loss(self, model, batch, step):
        return {"aux": F.cross_entropy(self.extra["aux"](model(batch["image"])), batch["target"])}


CASES: dict[str, tuple[type[Method], ...]] = {
    "plain": (),
    "two_pass": (TwoPass,),
    "zeroth": (ZerothOrder,),
    "duel": (Duel,),
    "grow": (Grow,),
    "nmask": (NMask,),
    "rates": (TokenRates,),
    "average": (Average,),
    "layer_rate": (LayerRate,),
    "calibrate": (Calibrate,),
    "until": (Until,),
    "cycles": (Cycles,),
    "grow+nmask+rates+calibrate": (Grow, NMask, TokenRates, Calibrate),
    "two_pass+duel+rates+average": (TwoPass, Duel, TokenRates, Average),
}
STEPS = 6


def stack(case: str) -> Stack:
    torch.manual_seed(3)
    return Stack(kind() for kind in CASES[case])


def make_loop(
    case: str = "plain",
    run_dir: Path | None = None,
    data: Any = None,
    steps: int = STEPS,
    options: RunOptions | None = None,
    **settings: Any,
) -> Loop:
    given = TrainSettings(**{"lr": 1e-2, **settings})
    plan = [Phase("fit", steps, warmup=0.3)]
    loaders = {"train": data or Data()}
    return Loop(stack(case), Task(), loaders, plan, settings=given, run_dir=run_dir, seed=5, options=options)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
