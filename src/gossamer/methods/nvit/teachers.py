"""The two teachers of NViT: a network whose first choice is a label, and the dense model's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.kits.teacher import FeatureTap, FrozenTeacher, resolve_teacher
from gossamer.methods.nvit.maths import hard_label_loss, kl_loss
from gossamer.tasks.classification import logits_of

__all__ = ["HEADS", "Teachers"]

HEADS = ("head", "head_dist")
"""Classifiers of a distilled DeiT: class token, distillation token."""


def has_two_heads(model: nn.Module) -> bool:
    """Whether the model has a class head and a distillation head."""
    return all(isinstance(getattr(model, h, None), nn.Linear) for h in HEADS)


@dataclass
class Teachers:
    """Both teachers, built when first asked.

    Attributes:
        dense: What ``resolve_teacher`` takes, or a bound teacher: gives the distribution.
        labels: Likewise: gives hard labels; ``None`` for none.
    """

    dense: Any
    labels: Any
    _tap: FeatureTap | None = field(default=None, init=False, repr=False)

    def _resolved(self, name: str, student: nn.Module) -> FrozenTeacher:
        teacher = getattr(self, name)
        if not isinstance(teacher, FrozenTeacher):
            teacher = resolve_teacher(teacher, student=student)
            setattr(self, name, teacher)
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.model.parameters()}:
            raise ModelError("nvit: teacher and student share parameters; pass a copy of the model or teacher='self'")
        return teacher

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record both heads of a distilled model while the context lasts."""
        inner = getattr(model, "module", model)
        if not has_two_heads(inner):
            yield
            return
        with FeatureTap(inner, HEADS, training_only=False) as tap:
            self._tap = tap
            try:
                yield
            finally:
                self._tap = None

    def heads(self, out: Any) -> tuple[Tensor, Tensor]:
        """Return the logits of class head and distillation head (of the only one, twice)."""
        if self._tap is None:
            return (out[0], out[1]) if isinstance(out, tuple | list) else (out, out)
        seen = self._tap.read()
        return seen[HEADS[0]], seen[HEADS[1]]

    def dense_logits(self, student: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dense teacher's logits of both heads (of its only one, twice)."""
        teacher = self._resolved("dense", student)
        paths = HEADS if has_two_heads(teacher.model) else ()
        taught = teacher(image, paths)
        return (taught.features[HEADS[0]], taught.features[HEADS[1]]) if paths else (taught.logits, taught.logits)

    def label_term(self, student: nn.Module, image: Tensor, distilled: Tensor) -> Tensor:
        """Return the loss of the distillation head against the first choice of the labelling teacher."""
        taught = self._resolved("labels", student)(image).logits
        if taught.shape != distilled.shape:
            raise ModelError(
                f"nvit: cnn_teacher has {taught.shape[-1]} classes, the student {distilled.shape[-1]}; give it a "
                f"teacher with the student's classes"
            )
        return hard_label_loss(distilled, taught)

    def dense_term(
        self, student: nn.Module, image: Tensor, heads: tuple[Tensor, Tensor], temperature: float, *, each: bool
    ) -> Tensor:
        """Return the divergence from the dense teacher: of each head separately, or of the heads' mean."""
        taught = self.dense_logits(student, image)
        if taught[0].shape != heads[0].shape:
            raise ModelError(
                f"nvit: teacher has {taught[0].shape[-1]} classes, the student {heads[0].shape[-1]}; give it a teacher "
                f"with the student's classes, or kl_weight: 0"
            )
        if not each:
            return kl_loss(logits_of(list(heads)), logits_of(list(taught)), temperature)
        return (kl_loss(heads[0], taught[0], temperature) + kl_loss(heads[1], taught[1], temperature)) / 2
