"""Manifold distillation as a method: a strong transformer teaches a plain student, block by block.

Paper: arXiv 2107.01378, "Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation"
(NeurIPS 2022). Reference code: Hao840/manifold-distillation at 1096b82 (no licence; not used). Changed:
class and distillation tokens are dropped on both sides, not counted from the difference of the lengths;
large grids are merged by default; the student may lose tokens to another method of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError, nearest
from gossamer.core.method import Edit, Method
from gossamer.core.schedule import Batch, Phase, Step, Terms
from gossamer.kits.teacher import SELF, FeatureTap, FrozenTeacher, Taught, block_paths, resolve_teacher
from gossamer.methods.manifold_distillation import maths
from gossamer.ops.tokens import TokenTrack, find_track
from gossamer.recipe import PRETRAIN

__all__ = ["ManifoldDistillation"]

HEADS = ("head", "head_dist")
"""Module paths of the classifiers of a distilled DeiT (class token, distillation token)."""
DEPTH = 4
"""Blocks paired from the front and from the back by default (released setting)."""
FILTERS = ("patch", "all")


@dataclass
class ManifoldDistillation(Method):
    """Match the student's patch relations and logits to a teacher's.

    ``loss = (1 - alpha) * labels + alpha * logits + beta * (w_intra * intra + w_inter * inter + w_random *
    random)``. With the default ``alpha=1`` the labels are not used at all, as released. Every term with a
    zero weight is neither computed nor tapped: ``beta=0`` is plain logit distillation, ``alpha=0, beta=0``
    plain training. The student itself is not changed.

    Args:
        teacher: A model, ``"self"`` (the dense model before any method changed it), a timm name,
            ``name@weights.safetensors`` or a saved folder. Its patch grid must be the student's.
        pairs: Student and teacher blocks to match, each by index or by module path; default the first
            four and the last four of both (fewer for shallow nets).
        w_intra: Weight of the intra-image term (>= 0).
        w_inter: Weight of the inter-image term (>= 0); it vanishes for a batch of one.
        w_random: Weight of the random-sampled term (>= 0).
        k: Patches drawn from the batch for the random term, anew for every pair and step.
        alpha: Share of the logit term, in [0, 1]; the labels get the rest.
        beta: Weight of the three manifold terms together (>= 0).
        tau: Temperature of the soft logit term (> 0).
        hard: Learn the teacher's first choice instead of its distribution.
        token_filter: ``"patch"`` drops class, distillation and register tokens; ``"all"`` keeps them.
        max_tokens: Merge neighbouring patches until at most this many remain; null leaves grids as they
            are. Tokens that another method has reduced lie on no grid and are never merged.
        label_smoothing: Smoothing of the label term, for hard labels (mixed ones bring their own).
    """

    teacher: str | nn.Module = SELF
    pairs: list[tuple[int | str, int | str]] | None = None
    w_intra: float = 4.0
    w_inter: float = 0.1
    w_random: float = 0.2
    k: int = 192
    alpha: float = 1.0
    beta: float = 1.0
    tau: float = 1.0
    hard: bool = False
    token_filter: str = "patch"
    max_tokens: int | None = 196
    label_smoothing: float = 0.0

    stage: ClassVar[str] = "training"
    touches: ClassVar[frozenset[str]] = frozenset({"loss"})
    needs: ClassVar[Mapping[str, str]] = {"tokens": "token_source"}

    _teacher: FrozenTeacher | None = field(default=None, init=False, repr=False, compare=False)
    _tap: FeatureTap | None = field(default=None, init=False, repr=False, compare=False)
    _plan: Edit = field(default_factory=dict, init=False, repr=False, compare=False)

    # -- teacher ---------------------------------------------------------------------------------
    def bind(self, dense: nn.Module) -> None:
        """Take ``dense`` as the teacher that ``"self"`` stands for."""
        self._teacher = FrozenTeacher(dense)

    def _resolve(self, model: nn.Module) -> FrozenTeacher:
        if self._teacher is None:
            self._teacher = resolve_teacher(self.teacher, student=model)
        shared = {id(p) for p in model.parameters()} & {id(p) for p in self._teacher.model.parameters()}
        if shared:
            raise ModelError(
                f"manifold_distillation: teacher and student share {len(shared)} parameters; a teacher must stay as "
                f"it is: pass copy.deepcopy(model) or teacher='self'"
            )
        return self._teacher

    # -- structure -------------------------------------------------------------------------------
    def check(self) -> None:
        """Check the options' values.

        Raises:
            RecipeError: A value is out of range; says which is allowed.
        """
        for name in ("w_intra", "w_inter", "w_random", "beta"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"manifold_distillation: {name}={getattr(self, name)}; expected 0 or more")
        for name in ("alpha", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"manifold_distillation: {name}={getattr(self, name)}; expected 0 to 1")
        if not self.tau > 0:
            raise RecipeError(f"manifold_distillation: tau={self.tau}; expected more than 0")
        if self.k < 2:
            raise RecipeError(f"manifold_distillation: k={self.k}; expected at least 2 patches")
        if self.max_tokens is not None and self.max_tokens < 4:
            raise RecipeError(f"manifold_distillation: max_tokens={self.max_tokens}; expected at least 4, or null")
        if self.token_filter not in FILTERS:
            raise RecipeError(
                f"manifold_distillation: token_filter={self.token_filter!r}; expected one of "
                f"{FILTERS}{nearest(self.token_filter, FILTERS)}"
            )

    @property
    def uses_blocks(self) -> bool:
        """Whether any manifold term has a weight."""
        return self.beta * (self.w_intra + self.w_inter + self.w_random) > 0

    def prepare(self, model: nn.Module) -> Edit | None:
        """Check options, heads and blocks; decide which modules to tap."""
        self.check()
        if not self.uses_blocks and self.alpha == 0:
            return None
        teacher = self._resolve(model).model
        two_heads = self.alpha > 0 and all(isinstance(getattr(model, h, None), nn.Linear) for h in HEADS)
        if two_heads and self.alpha == 1:
            raise RecipeError(
                "manifold_distillation: alpha=1 would leave the class head of a distilled student (head, head_dist) "
                "untrained; expected 0 <= alpha < 1, for example alpha=0.5"
            )
        ours, theirs = (getattr(m, "num_classes", None) for m in (model, teacher))
        if self.alpha > 0 and None not in (ours, theirs) and ours != theirs:
            raise ModelError(
                f"manifold_distillation: the teacher has {theirs} classes, the student {ours}; give the teacher the "
                f"student's head or distil relations only (alpha=0)"
            )
        return {"pairs": self._paths(model, teacher) if self.uses_blocks else [], "heads": two_heads, "turns": None}

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Distil in the turns that train the weights of a whole model; searches keep their own objective.

        A model that still grows, or that is only becoming its own teacher, trains without.
        """
        if not self._plan:
            return None
        untrained = self.teacher == SELF and phase.whole == PRETRAIN  # what pretraining leaves is the teacher
        teaches = phase.work is None and not phase.growing and not untrained
        turns = [t.name for t in phase.turns if "weights" in t.trains and t.objective is None] if teaches else []
        return {**self._plan, "turns": {"phase": phase.name, "names": turns}}

    def finish(self, model: nn.Module) -> Edit | None:
        """Take the taps off."""
        return {"pairs": [], "heads": False, "turns": {"phase": "", "names": []}} if self._plan else None

    def apply(self, model: nn.Module, edit: Edit) -> nn.Module:
        """Tap the modules that ``edit`` names; ``model`` itself stays as it is."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
        self._plan = edit
        active = edit["turns"] is None or bool(edit["turns"]["names"])
        if active:
            self._resolve(model)
        paths = [s for s, _ in edit["pairs"]] + (list(HEADS) if edit["heads"] else [])
        if paths and active:
            self._tap = FeatureTap(model, paths)
        track = find_track(model)
        if track is not None:
            track.trace = active and bool(edit["pairs"])
        return model

    def _paths(self, model: nn.Module, teacher: nn.Module) -> list[list[str]]:
        """Return the pairs as module paths."""
        if self.pairs is not None:
            if not self.pairs:
                raise RecipeError("manifold_distillation: pairs is empty; name block pairs, or set beta=0")
            return [[_path(model, s, "student"), _path(teacher, t, "teacher")] for s, t in self.pairs]
        ours, theirs = block_paths(model), block_paths(teacher)
        n = min(DEPTH, len(ours) // 2, len(theirs) // 2)
        if n == 0:
            return [[ours[-1], theirs[-1]]]
        front = zip(ours[:n], theirs[:n], strict=True)
        return [list(p) for p in (*front, *zip(ours[-n:], theirs[-n:], strict=True))]

    # -- step ------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch, out: Any, step: Step) -> Terms:
        """Return the logit, label and manifold terms of a turn that trains weights.

        Terms: ``"task"`` (label term, replacing the task's own; absent for ``alpha=0``), ``"distil_logits"``,
        ``"distil_intra"``, ``"distil_inter"``, ``"distil_random"``, weighted as they are summed.

        Raises:
            ModelError: Patch grids, class counts or outputs do not fit the teacher's.
        """
        seen = self._tap.read() if self._tap is not None and self._active(step) else {}
        if not self._plan or not self._active(step):
            self._forget()
            return {}
        pairs = self._plan["pairs"]
        taught = self._resolve(model)(batch["image"], [t for _, t in pairs])
        terms: Terms = {}
        if self.alpha > 0:
            logits, distilled = (seen[h] for h in HEADS) if self._plan["heads"] else (out, out)
            terms |= self._logit_terms(logits, distilled, taught.logits, batch["target"])
        if pairs:
            terms |= self._manifold_terms(model, seen, taught, step)
        return terms

    def _active(self, step: Step) -> bool:
        turns = self._plan.get("turns")
        return turns is None or (turns["phase"] == step.phase and step.turn in turns["names"])

    def _forget(self) -> None:
        if self._tap is not None:
            self._tap.clear()

    def after_step(self, model: nn.Module, step: Step) -> None:
        """Let go of what turns with an objective of their own left in the taps."""
        self._forget()

    def _logit_terms(self, logits: Any, distilled: Any, taught: Tensor, target: Tensor) -> Terms:
        if not isinstance(logits, Tensor):
            raise ModelError(f"manifold_distillation: the student returned {type(logits).__name__}; expected logits")
        if distilled.shape != taught.shape:
            raise ModelError(
                f"manifold_distillation: student logits {tuple(distilled.shape)}, the teacher's {tuple(taught.shape)}; "
                f"expected equal class counts, or alpha=0"
            )
        kd = maths.hard_loss(distilled, taught) if self.hard else maths.soft_loss(distilled, taught, self.tau)
        label = torch.zeros((), device=logits.device)
        if self.alpha < 1:
            smoothing = self.label_smoothing if target.ndim == 1 else 0.0
            label = (1 - self.alpha) * F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
        return {"task": label, "distil_logits": self.alpha * kd}

    def _manifold_terms(self, model: nn.Module, seen: Mapping[str, Tensor], taught: Taught, step: Step) -> Terms:
        """Average each weighted term over the pairs."""
        pairs = self._plan["pairs"]
        sums: dict[str, list[Tensor]] = {"intra": [], "inter": [], "random": []}
        for n, (ours, theirs) in enumerate(pairs):
            student, teacher = (
                maths.unit_tokens(x) for x in self._aligned(model, ours, seen[ours], taught.features[theirs])
            )
            if self.w_intra > 0:
                sums["intra"].append(self.w_intra * maths.intra_loss(student, teacher))
            if self.w_inter > 0:
                sums["inter"].append(self.w_inter * maths.inter_loss(student, teacher))
            if self.w_random > 0:
                total = student.shape[0] * student.shape[1]
                draw = torch.randperm(total, generator=step.generator(f"manifold_distillation.{n}"))[: self.k]
                sums["random"].append(self.w_random * maths.random_loss(student, teacher, draw.to(student.device)))
        return {f"distil_{name}": self.beta * torch.stack(t).mean() for name, t in sums.items() if t}

    def _aligned(self, model: nn.Module, path: str, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Return student and teacher tokens [B, N, Ds], [B, N, Dt] that stand for the same patches."""
        other = self._resolve(model).model
        track = find_track(model)
        prefix, other_prefix = (getattr(m, "num_prefix_tokens", 0) for m in (model, other))
        teacher, grid = _tokens(other, theirs, other_prefix, self.token_filter)
        if track is not None:
            keep = prefix if self.token_filter == "patch" else 0
            return ours[:, keep:], maths.carry(_leaving(track, model, path), teacher, keep)
        student, own_grid = _tokens(model, ours, prefix, self.token_filter)
        if self.max_tokens is not None and grid is not None and own_grid is not None:
            student, own_grid = maths.merge_patches(student, own_grid, self.max_tokens)
            teacher, grid = maths.merge_patches(teacher, grid, self.max_tokens)
        if student.shape[1] != teacher.shape[1] or (None not in (grid, own_grid) and grid != own_grid):
            raise ModelError(
                f"manifold_distillation at {path}: the student has {own_grid or student.shape[1]} patches, the "
                f"teacher {grid or teacher.shape[1]}; expected equal grids: choose a teacher with the student's patch "
                f"size, pairs of equal resolution, or beta=0"
            )
        return student, teacher

    # -- report ----------------------------------------------------------------------------------
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the teacher, the pairs and the weights."""
        name = type(self._teacher.model).__name__ if self._teacher is not None else None
        return {
            "facts": {
                "teacher": self.teacher if isinstance(self.teacher, str) else name,
                "labels": 1 - self.alpha,
                "logits": self.alpha,
                "kind": "hard" if self.hard else f"soft, temperature {self.tau:g}",
            },
            "tables": [
                {
                    "title": "Weights of the manifold terms",
                    "columns": ["term", "weight"],
                    "rows": [[n, self.beta * getattr(self, f"w_{n}")] for n in ("intra", "inter", "random")],
                }
            ],
        }


def _path(model: nn.Module, block: int | str, side: str) -> str:
    if isinstance(block, str):
        return block
    known = block_paths(model)
    if not -len(known) <= block < len(known):
        raise RecipeError(
            f"manifold_distillation: pairs name {side} block {block}; {type(model).__name__} has blocks 0 to "
            f"{len(known) - 1}"
        )
    return known[block]


def _leaving(track: TokenTrack, model: nn.Module, path: str) -> Tensor:
    """Return the source matrix of the tokens that leave the block at ``path``."""
    known = block_paths(model)
    source = track.source[known.index(path) + 1] if path in known else None
    if source is None:
        raise ModelError(
            f"manifold_distillation at {path}: no record of what its tokens stand for; expected one of the blocks "
            f"{known[0]} to {known[-1]} of a model that reduces tokens and records their source"
        )
    return source


def _tokens(model: nn.Module, x: Tensor, prefix: int, keep: str) -> tuple[Tensor, tuple[int, int] | None]:
    """Return a block output as tokens [B, N, C] with their grid, where they lie on one."""
    if x.ndim == 4 and getattr(model, "output_fmt", "NCHW") != "NHWC":
        raise ModelError(
            f"manifold_distillation: a block of {type(model).__name__} returns {tuple(x.shape)}; expected tokens "
            f"[B, N, C], or [B, H, W, C] from a model with output_fmt 'NHWC' (Swin)"
        )
    if keep == "all" and x.ndim == 3:
        return x, None
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return maths.patch_tokens(x, prefix, None if grid is None else (grid[0], grid[1]))
