"""Image classification: loss, top-1 and top-5, in torch or in any runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, RecipeError
from gossamer.core.schedule import Batch, Terms
from gossamer.data.loading import Mixing
from gossamer.data.loading import batches as image_batches
from gossamer.data.sources import ImageSource, check_classes, open_data
from gossamer.data.transforms import PictureTransform, eval_transform, train_transform
from gossamer.models.preprocessing import Preprocessing
from gossamer.recipe import DataSettings
from gossamer.tasks.paired import compare, wilson
from gossamer.tasks.task import HasModel, Metric, in_evaluation

__all__ = ["Classification", "Evaluation", "Predict", "logits_of", "predictor"]

Predict = Callable[[Tensor], Any]
"""Images [B, C, H, W] to logits [B, K] (tensor or array)."""


def logits_of(out: Any) -> Tensor:
    """Return the class scores of a model's output.

    DeiT with a distillation token gives two heads' scores in training (``distilled_training``);
    they count as their mean, as timm does at inference (arXiv 2012.12877, section 4).
    """
    if isinstance(out, tuple | list):
        return torch.stack([o for o in out]).mean(0)
    return out


def predictor(model: nn.Module) -> Predict:
    """Return a function from images to logits [B, K] (float32, on the CPU) in evaluation mode.

    Every module's training flag is as before after each call.
    """

    return in_evaluation(model, logits_of)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a data set.

    Attributes:
        logits: [N, K] float32.
        targets: [N] class indices.
        names: Names of the N images.
        top1: Top-1 accuracy, in [0, 1].
        top5: Top-5 accuracy, in [0, 1] (1 where there are at most 5 classes).
        interval: 95 % Wilson interval of ``top1``, in [0, 1].
    """

    logits: Tensor
    targets: Tensor
    names: list[str]
    top1: float
    top5: float
    interval: tuple[float, float]

    @property
    def score(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1

    @property
    def score_interval(self) -> tuple[float, float]:
        """Its interval, in percent."""
        return 100 * self.interval[0], 100 * self.interval[1]

    def to_json(self) -> dict[str, Any]:
        """Return the figures without the logits."""
        return {
            "images": len(self.names), "top1": self.top1, "top1_interval": list(self.interval), "top5": self.top5,
        }  # fmt: skip

    @classmethod
    def from_logits(cls, logits: Tensor, targets: Tensor, names: list[str] | None = None) -> Evaluation:
        """Score logits [N, K] against targets [N].

        Raises:
            DataError: No images, or a target outside the classes.
        """
        n, classes = logits.shape
        if n == 0:
            raise DataError("evaluation got 0 images; expected at least 1")
        if int(targets.max()) >= classes or int(targets.min()) < 0:
            raise DataError(
                f"targets run from {int(targets.min())} to {int(targets.max())}, the model has {classes} classes; "
                f"use the data the classifier was made for, or replace the head with num_classes"
            )
        best = logits.topk(min(5, classes), dim=1).indices
        hits = best == targets[:, None]
        first = int(hits[:, 0].sum())
        return cls(
            logits=logits,
            targets=targets,
            names=names if names is not None else [str(i) for i in range(n)],
            top1=first / n,
            top5=int(hits.any(1).sum()) / n,
            interval=wilson(first, n),
        )


@dataclass
class Classification:
    """Cross-entropy on hard, smoothed or soft targets.

    Attributes:
        label_smoothing: In [0, 1); applies to hard targets only (mixup smooths its own).
        num_classes: Classes of the classifier; ``check`` fills it in.
    """

    metric: ClassVar[Metric] = Metric("top1", "Top-1", "%", True, "Accuracy in this runtime, with its 95 % interval")

    label_smoothing: float = 0.0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise RecipeError(f"label smoothing is {self.label_smoothing}; expected 0 <= smoothing < 1")

    def open(self, spec: str) -> ImageSource:
        """Return labelled images."""
        return open_data(spec)

    def check(self, source: ImageSource | None, model: nn.Module) -> None:
        """Check that data and classifier have the same classes; keep their number.

        Raises:
            DataError: The numbers differ.
        """
        if source is not None:
            self.num_classes = check_classes(source, model)

    def configure(self, data: DataSettings) -> dict[str, Any]:
        """Take the label smoothing; return how training mixes images."""
        self.label_smoothing = data.smoothing or self.label_smoothing
        mixing = Mixing(mixup=data.mixup, cutmix=data.cutmix, smoothing=data.smoothing)
        return {"mixing": mixing, "num_classes": self.num_classes}

    def train_view(self, pre: Preprocessing, data: DataSettings) -> PictureTransform:
        """Return the augmented view (``data.augment``)."""
        return train_transform(pre, data.augment)

    def still_view(self, pre: Preprocessing) -> PictureTransform:
        """Return the view that a model is evaluated with."""
        return eval_transform(pre)

    def batches(self, source: ImageSource, pre: Preprocessing, batch: int) -> Iterator[Batch]:
        """Yield every readable image once, resized and cropped."""
        return image_batches(source, eval_transform(pre), batch)

    def compare(self, reference: Evaluation, other: Evaluation) -> dict[str, Any]:
        """Return agreement, McNemar test, interval of the difference and KL (``tasks.paired``)."""
        return compare(reference.logits, other.logits, reference.targets).to_json()

    def gallery(self, stages: Sequence[HasModel], source: ImageSource, pre: Preprocessing) -> list[dict[str, Any]]:
        """Return no pictures: outputs are numbers."""
        return []

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Any, Terms]:
        """Run the model; return its raw output and ``{"task": mean cross-entropy}``."""
        out = model(batch["image"])
        return out, {"task": self.cross_entropy(logits_of(out), batch["target"])}

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats.

        Args:
            logits: [B, K].
            target: [B] class indices, or [B, K] class probabilities.
        """
        logits = logits.float()
        if target.ndim == 1:
            return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        return -(target.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum(-1).mean()

    def evaluate(self, predict: Predict, batches: Iterable[Batch]) -> Evaluation:
        """Score a predict function (see ``predictor``; a runtime session's works too).

        Raises:
            DataError: No images, or a target outside the model's classes.
        """
        logits: list[Tensor] = []
        targets: list[Tensor] = []
        names: list[str] = []
        for batch in batches:
            out = predict(batch["image"])
            out = torch.from_numpy(np.asarray(out)) if not isinstance(out, Tensor) else out
            logits.append(out.detach().float().cpu())
            targets.append(batch["target"].cpu())
            names.extend(batch["id"])
        if not logits:
            raise DataError("evaluation got 0 images; expected at least 1")
        return Evaluation.from_logits(torch.cat(logits), torch.cat(targets), names)
