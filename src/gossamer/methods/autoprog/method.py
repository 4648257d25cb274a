"""AutoProg: Automated Progressive Learning for Efficient Training of Vision Transformers (arXiv 2203.14509, CVPR 2022).

Trains a vision transformer from scratch that starts shallow and at low resolution and grows in stages to the full
model; a one-shot supernet decides at each stage whether, where and how much. Reference: changlin31/AutoProg at
e7ecc98 (Apache-2.0; used as an oracle only). Ours: blocks are absent, not masked; pictures are made at the size
wanted; every step, search included, counts towards the training's own steps; optimiser moments stay with blocks
that stay (``reset_optimizer`` for the release's behaviour); see the card for the rest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.errors import ModelError, PlanError, RecipeError, nearest
from gossamer.core.method import Edit, Evaluate, Grads, Method
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step
from gossamer.data.loading import StepLoader
from gossamer.data.transforms import PictureTransform, Rendering
from gossamer.kits.ema import Ema
from gossamer.kits.growth.depth import OPERATORS, blocks_of, grow_model, put_blocks, set_drop_rates
from gossamer.kits.growth.elastic import Elastic
from gossamer.methods.autoprog import maths
from gossamer.methods.autoprog.plan import Place, place, split
from gossamer.methods.autoprog.scoring import buffers_kept, measured_cost, training_losses
from gossamer.models.growing import Layout, growth_layout, resizable

__all__ = ["AutoProg"]

RELEASE = "mogrow_release"
DIMENSIONS = ("depth", "resolution")
REGULARISERS = ("magnitude", "drop_path", "erase")
RANGES = {
    "stages": (1, 100), "start_scale": (0.01, 1.0), "resolution_step": (1, 1024), "momentum": (0.0, 1.0),
    "release_momentum": (0.0, 1.0), "search_ratio": (0.0, 1.0), "records": (1, 1000), "batches": (1, 10**6),
    "timing_steps": (1, 10**6),
}  # fmt: skip


@dataclass
class AutoProg(Method):
    """Training that grows the network and its input.

    Attributes:
        phase: The training that grows (``"fit"``, or ``"pretrain"`` of a recipe that has one).
        stages: Number of stages; the last one is always the full network at full resolution.
        start_scale: Share of depth and resolution at the first stage, in (0, 1].
        dims: What grows: ``"depth"``, ``"resolution"``.
        resolution_step: Resolutions are multiples of it; ``None``: two token strides (32 pixels for patches of 16).
        growth: How new blocks begin: ``"mogrow"`` (published: the momentum copy of their source),
            ``"mogrow_release"`` (the whole network from a slower momentum copy), ``"interpolate"``, ``"stack"``,
            ``"identity"``, ``"random"``, ``"noise"``.
        momentum: Decay of the momentum copy, also used to score candidates (published: 0.998). ``None``: it remembers
            a fifth of a search as in the published trainings, where that gives 0.998; at most that.
        release_momentum: Decay of the slower copy of ``"mogrow_release"``.
        momentum_warmup: Let the decay rise over the first updates: the copy would otherwise be the initial weights.
        search: Decide by a supernet; off: the manual linear schedule.
        search_first: Search the first stage too (published); off: it is the schedule's. A first search shorter than the
            learning rate's warm-up sees networks that have learned nothing yet.
        search_ratio: Share of a stage that the supernet trains (published: 2 of 25 epochs).
        records: How often candidates are scored in a search; their losses are averaged.
        batches: Training batches a candidate is scored on, the same for all.
        timing_steps: Forward and backward passes that its time is the median of.
        cost: ``"time"`` (measured here) or ``"macs"`` (counted; the same everywhere).
        stay: Whether a depth may stay as it is at a search (the release always grows it).
        regularisation: Share of its final strength that each regulariser starts with: RandAugment
            ``magnitude``, ``drop_path``, random-``erase`` probability.
        reset_optimizer: Start with fresh optimisers wherever the network may change (paper and release).
    """

    stage: ClassVar[str] = "growth"
    touches: ClassVar[frozenset[str]] = frozenset({"weights"})

    phase: str = "fit"
    stages: int = 4
    start_scale: float = 0.5
    dims: list[str] = field(default_factory=lambda: list(DIMENSIONS))
    resolution_step: int | None = None
    growth: str = "mogrow"
    momentum: float | None = None
    release_momentum: float = 0.9996
    momentum_warmup: bool = True
    search: bool = True
    search_first: bool = True
    search_ratio: float = 0.08
    records: int = 5
    batches: int = 50
    timing_steps: int = 50
    cost: str = "time"
    stay: bool = True
    regularisation: dict[str, float] = field(default_factory=lambda: {"magnitude": 0.5, "drop_path": 0.0, "erase": 0.0})
    reset_optimizer: bool = False

    _layout: Layout | None = field(default=None, init=False, repr=False, compare=False)
    _now: Edit = field(default_factory=dict, init=False, repr=False, compare=False)
    _past: list[Edit] = field(default_factory=list, init=False, repr=False, compare=False)
    _copies: list[Ema] = field(default_factory=list, init=False, repr=False, compare=False)
    _losses: dict[str, list[list[float]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _costs: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _size: int | None = field(default=None, init=False, repr=False, compare=False)

    # -- schedule --------------------------------------------------------------------------------
    def check(self) -> None:
        """Check the options' values.

        Raises:
            RecipeError: A value is out of range; says which is allowed.
        """
        choices: dict[str, tuple[list[str], tuple[str, ...]]] = {
            "growth": ([self.growth], (*OPERATORS, RELEASE)),
            "cost": ([self.cost], ("time", "macs")),
            "dims": (self.dims, DIMENSIONS),
            "regularisation": (list(self.regularisation), REGULARISERS),
        }
        for name, (given, known) in choices.items():
            for value in given:
                if value not in known:
                    raise RecipeError(f"autoprog: {name} {value!r}; expected of {known}{nearest(value, known)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RecipeError(f"autoprog: {name}={value}; expected {low} to {high}")
        for name, share in self.regularisation.items():
            if share > 1:
                raise RecipeError(f"autoprog: regularisation {name}={share}; expected at most 1")

    def depths(self) -> list[int]:
        """Return the number of blocks at each stage of the manual schedule."""
        most = self._full.depth
        return maths.schedule(self.start_scale if "depth" in self.dims else 1.0, self.stages, most)

    def sizes(self) -> list[int]:
        """Return the side of the input at each stage of the manual schedule."""
        layout = self._full
        step = self.resolution_step or 2 * layout.stride
        if step % layout.stride:
            raise RecipeError(f"autoprog: resolution_step={step}; expected a multiple of {layout.stride} pixels")
        return maths.schedule(self.start_scale if "resolution" in self.dims else 1.0, self.stages, layout.size, step)

    def level(self, stage: int) -> dict[str, float]:
        """Return the share of its final strength that each regulariser has at a stage, in [0, 1]."""
        starts = {name: self.regularisation.get(name, 1.0) for name in REGULARISERS}
        return {name: max(0.0, maths.shares(start, self.stages)[stage]) for name, start in starts.items()}

    def phases(self, plan: Plan) -> Plan:
        """Cut the training into stages and searches; a training of no steps stays as it is.

        Raises:
            PlanError: The training is shorter than the growth schedule, or there are several of that name.
        """

        def parts(phase: Phase) -> list[Phase]:
            if phase.steps == 0:
                return [phase]
            ratio = self.search_ratio if self.search else None
            return split(
                phase, stages=self.stages, search=ratio, first=self.search_first, records=self.records,
                score=self._score, done=self._scored, fresh=self.reset_optimizer,
            )  # fmt: skip

        names = [p.name for p in plan if p.name.split(".")[0] == self.phase]
        if len(names) > 1:
            raise PlanError(f"autoprog: phases {names} are all {self.phase!r}; expected one training to grow in")
        return plan.swap(self.phase, parts)

    # -- structure -------------------------------------------------------------------------------
    @property
    def _full(self) -> Layout:
        if self._layout is None:
            raise ModelError("autoprog: no model was prepared; call prepare(model) first")
        return self._layout

    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options and model, and note what the full model is like.

        Raises:
            ModelError: Neither a timm vision transformer nor timm's VOLO.
            RecipeError: An option is out of range.
        """
        self.check()
        return {"layout": growth_layout(model).to_json()}

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Grow, start a supernet, or take the chosen network out of it."""
        at = place(phase, self.phase)
        if at is None or at.kind == "score" or (at.kind == "super" and at.number > 0):
            return None
        edit = self._supernet(at) if at.kind == "super" else self._stage(at)
        seed = int(torch.randint(2**31, ())) if self.growth in OPERATORS and OPERATORS[self.growth].drawn else 0
        turns = [t.name for t in phase.turns if "weights" in t.trains]
        common = {"stage": at.stage, "kind": at.kind, "turns": turns, "seed": seed, "momentum": self._decay(phase)}
        return {**edit, **common}

    def _decay(self, phase: Phase) -> float:
        total = phase.steps if phase.window is None else phase.window.total
        return maths.momentum(self.search_ratio * total / self.stages) if self.momentum is None else self.momentum

    def _supernet(self, at: Place) -> Edit:
        """Return the supernet of a stage: the largest candidate, and which candidates there are."""
        first, depths, sizes = not self._now, self.depths(), self.sizes()
        now = (None, None) if first else (self._now["depth"], self._now["sizes"][-1])
        deep = maths.candidates(depths, now[0], stay=self.stay, most=3)
        wide = maths.candidates(sizes, now[1], stay=True, most=2)
        deep = [d for d in deep if self._doubles(deep[0], d)]  # nested sub-networks reach to twice the depth
        start = depths[0] if first else None
        level = {name: 1.0 for name in REGULARISERS}  # searched under the final regularisation
        return {"start": start, "depth": deep[-1], "least": deep[0], "depths": deep, "sizes": wide, "level": level}

    def _doubles(self, least: int, most: int) -> bool:
        small, large = maths.split_depth(least, self._full), maths.split_depth(most, self._full)
        return all(b <= 2 * a for a, b in zip(small, large, strict=True))

    def _stage(self, at: Place) -> Edit:
        """Return the network of a stage: by the schedule, by the search, or the full one at the end."""
        start = None if self._now else self.depths()[0]
        level = self.level(at.stage)
        if not self._searched(at.stage):
            depth, size = self.depths()[at.stage], self.sizes()[at.stage]
            return {"start": start, "depth": depth, "least": None, "sizes": [size], "level": level}
        (size, depth), report = self._chosen()
        return {"start": None, "depth": depth, "least": None, "sizes": [size], "level": level, "search": report}

    def _searched(self, stage: int) -> bool:
        return self.search and stage < self.stages - 1 and (stage > 0 or self.search_first)

    def _chosen(self) -> tuple[tuple[int, int], dict[str, Any]]:
        pairs = self._candidates()
        if len(pairs) == 1:
            return pairs[0], {}
        records = self._losses.values()
        means = [statistics.fmean(v for r in records for v in r[i]) for i in range(len(pairs))]
        if not all(math.isfinite(v) for v in means):
            raise ModelError(f"autoprog: losses of the candidates are {means}; expected finite numbers. Lower train.lr")
        size = maths.planned(self._now["sizes"], self.sizes()[self._now["stage"]])
        depth = maths.planned(self._now["depths"], self.depths()[self._now["stage"]])
        best, weight, scores = maths.choose(self._costs, means, pairs.index((size, depth)))
        rows = [[*pair, *rest] for pair, *rest in zip(pairs, self._costs, means, scores, strict=True)]
        return pairs[best], {"weight": weight, "candidates": rows}

    def _candidates(self) -> list[tuple[int, int]]:
        """Return (size, depth) of every sub-network of the supernet at hand; one or none: nothing to search."""
        return [(r, d) for r in self._now.get("sizes", []) for d in self._now.get("depths", [])]

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Note the full model's layout, or give the model the depth, input and regularisation of ``edit``."""
        if "layout" in edit:
            self._layout = Layout.from_json(edit["layout"])
            return model
        layout, last = self._full, edit["kind"] == "stage" and edit["stage"] == self.stages - 1
        for copy in self._copies:
            copy.follow(model)  # before anything moves
        counts = maths.split_depth(edit["depth"], layout)
        elastic = self._elastic()
        if edit["start"] is not None:
            for chain, count in zip(layout.chains, maths.split_depth(edit["start"], layout), strict=True):
                put_blocks(model, chain, blocks_of(model, chain)[:count])
            self._copies = self._new_copies(model, edit["momentum"])
        if elastic is not None and edit["kind"] == "stage":
            elastic.extract(model, counts)
        self._grow(model, counts, edit["seed"])
        model = resizable(model, layout, on=not last)
        set_drop_rates(model, layout, edit["level"]["drop_path"])
        for copy in self._copies:
            copy.follow(model)
        self._now = edit
        self._past.append(edit)
        if edit["kind"] == "super":
            self._losses, self._costs = {}, []
        if last:
            self._copies = []
        return model

    def _grow(self, model: nn.Module, counts: list[int], seed: int) -> None:
        chains = self._full.chains
        if all(len(blocks_of(model, c)) >= n for c, n in zip(chains, counts, strict=True)):
            return
        operator, average = self.growth, None
        if self.growth == RELEASE:
            operator, slow = "interpolate", self._copies[-1]
            slow.exchange(model)  # the network goes on from its slow copy, old blocks and all
            slow.load_state_dict({}, slow.updates)  # which begins anew at these weights
        elif OPERATORS[operator].averaged:
            average = self._copies[0].average
        generator = torch.Generator().manual_seed(seed)
        grow_model(model, chains, counts, operator, average=average, generator=generator)

    def _new_copies(self, model: nn.Module, momentum: float) -> list[Ema]:
        decays = [momentum] if self.search or self.growth == "mogrow" else []
        decays += [self.release_momentum] if self.growth == RELEASE else []
        copies = [Ema(d, warmup=self.momentum_warmup) for d in decays]
        for copy in copies:
            copy.follow(model)
        return copies

    def _elastic(self) -> Elastic | None:
        if not self._now.get("least") or len(self._now["depths"]) < 2:
            return None
        least, most = (tuple(maths.split_depth(self._now[k], self._full)) for k in ("least", "depth"))
        return Elastic(self._full.chains, least, most)

    # -- step ------------------------------------------------------------------------------------
    def loader(self, name: str, loader: Loader) -> Loader:
        """Let pictures be made at the size and strength of the stage.

        Gossamer's loader crops straight to the size; batches of other loaders are resized (bilinear, as the
        release does), and their augmentation stays as it is.
        """
        if isinstance(loader, StepLoader) and isinstance(loader.transform, PictureTransform):
            return loader.rendered(self._rendering)

        def resized(step: Step) -> Batch:
            batch, size = loader(step), self._rendering(step).size
            if size is None or batch["image"].shape[-1] == size:
                return batch
            image = F.interpolate(batch["image"], (size, size), mode="bilinear", align_corners=False)
            return {**batch, "image": image}

        return resized

    def _rendering(self, step: Step) -> Rendering:
        """Return how the pictures of a step are made; the sizes of a supernet are drawn alike on all ranks."""
        if not self._now or (self._now["kind"] == "stage" and self._now["stage"] == self.stages - 1):
            return Rendering()
        level, sizes = self._now["level"], self._now["sizes"]
        size = self._size
        if size is None:
            size = sizes[int(torch.randint(len(sizes), (), generator=step.generator("autoprog.size")))]
        return Rendering(size, level["magnitude"], level["erase"])

    def wrap_grads(self, grads: Grads, evaluate: Evaluate) -> Grads:
        """In a supernet, run one of its depths, drawn uniformly and alike on all ranks."""

        def drawn(model: nn.Module, batch: Batch, step: Step, params: list[nn.Parameter]) -> dict[str, Any]:
            elastic = self._elastic()
            if elastic is None:
                return grads(model, batch, step, params)
            depths = self._now["depths"]
            depth = depths[int(torch.randint(len(depths), (), generator=step.generator("autoprog.depth")))]
            with elastic.running(model, maths.split_depth(depth, self._full)):
                return grads(model, batch, step, params)

        return drawn

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Let the momentum copies follow the weights."""
        if self._copies and step.turn in self._now["turns"]:
            for copy in self._copies:
                copy.update(model, model.parameters())

    # -- scoring ---------------------------------------------------------------------------------
    def _scored(self, record: int) -> bool:
        pairs = self._candidates()
        return len(pairs) < 2 or len(self._losses.get(str(record), [])) >= len(pairs)

    def _score(self, record: int, model: nn.Module, loaders: Mapping[str, Loader], step: Step) -> dict[str, float]:
        """Score the next size's depths: training losses under the momentum copy and, at the first record, costs."""
        rows, draw, depths = self._losses.setdefault(str(record), []), loaders["train"], self._now["depths"]
        size = self._now["sizes"][len(rows) // len(depths)]
        # the draws do not depend on the candidate: all see the same pictures
        drawn = [Step("autoprog.score", "work", i, self.batches, step.seed, step.rank) for i in range(self.batches)]
        terms = {"size": float(size)}
        with self._copies[0].applied(model), buffers_kept(model), self._sized(size):
            rows += training_losses(model, (draw(s) for s in drawn), [self._network(model, d) for d in depths])
            for depth, losses in zip(depths, rows[-len(depths) :], strict=True):
                terms[f"loss.{depth}"] = statistics.fmean(losses)
                if len(self._costs) < len(rows):
                    with self._network(model, depth)():
                        self._costs.append(measured_cost(self.cost, model, draw(drawn[0]), self.timing_steps))
                    terms[f"{self.cost}.{depth}"] = self._costs[-1]
        return terms

    def _network(self, model: nn.Module, depth: int) -> Callable[[], AbstractContextManager[None]]:
        """Return what lets ``model`` be the sub-network of ``depth`` blocks."""
        elastic, counts = self._elastic(), maths.split_depth(depth, self._full)
        return nullcontext if elastic is None else lambda: elastic.running(model, counts)

    @contextmanager
    def _sized(self, size: int) -> Iterator[None]:
        self._size = size
        try:
            yield
        finally:
            self._size = None

    # -- report and state ------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return what the network was at each stage, and what each search saw."""
        stages = [e for e in self._past if e["kind"] == "stage"]
        if not stages:
            return {}
        rows = [[e["stage"], e["sizes"][-1], e["depth"]] for e in stages]
        tables = [{"title": "Growth", "columns": ["stage", "resolution", "blocks"], "rows": rows}]
        for e in stages:
            if e.get("search"):
                columns = ["resolution", "blocks", self.cost, "loss", "score"]
                title = f"Search of stage {e['stage']} (weight of cost {e['search']['weight']:.3f})"
                tables.append({"title": title, "columns": columns, "rows": e["search"]["candidates"]})
        facts = {"growth": self.growth, "search": self.search, "stages": self.stages, "start": self.start_scale}
        return {"facts": facts, "tables": tables}

    def state_dict(self) -> dict[str, Any]:
        """Return momentum copies and the records of a search that is under way."""
        copies = [{"average": c.state_dict(), "updates": c.updates} for c in self._copies]
        return {"copies": copies, "losses": {k: list(v) for k, v in self._losses.items()}, "costs": list(self._costs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for copy, kept in zip(self._copies, state["copies"], strict=True):
            copy.load_state_dict(kept["average"], kept["updates"])
        self._losses = {k: list(v) for k, v in state["losses"].items()}
        self._costs = list(state["costs"])
