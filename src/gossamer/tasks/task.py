"""What the pipeline asks of a task: from pictures to batches, from outputs to a loss and to figures.

A task is a dataclass whose fields are the options of a recipe (``task: {super_resolution: {scale: 2}}``). The
pipeline, the report and the command line know this interface only; none of them asks which task is running.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.core.schedule import Batch, Terms
from gossamer.data.images import ImageSource
from gossamer.data.transforms import Transform
from gossamer.models.preprocessing import Preprocessing
from gossamer.ops.modes import evaluating
from gossamer.recipe import DataSettings

__all__ = ["Evaluation", "HasModel", "Metric", "Predict", "Task", "in_evaluation", "picture_uri", "predict_with"]


@dataclass(frozen=True)
class Metric:
    """The figure a task is judged by.

    Attributes:
        key: Name in result rows and JSON.
        name: What a table calls it.
        unit: ``"%"``, ``"dB"``, ``""``.
        higher: Whether more is better.
        help: One line for a reader.
    """

    key: str
    name: str
    unit: str = ""
    higher: bool = True
    help: str = ""

    def drop(self, before: float, after: float) -> float:
        """Return by how much ``after`` is worse than ``before``, in the metric's unit."""
        return before - after if self.higher else after - before

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


class Predict(Protocol):
    """A model as a function of images, in torch or in a runtime.

    Attributes:
        size: (C, H, W) of the only images it takes; ``None``: any that the model itself takes.
    """

    size: tuple[int, int, int] | None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the output for images [B, C, H, W], float32 on the CPU."""
        ...


class Evaluation(Protocol):
    """Figures of a model on a data set."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the images, in order."""
        ...

    @property
    def score(self) -> float:
        """The task's metric, in its unit."""
        ...

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, in its unit."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON, by the names that result rows have."""
        ...


class HasModel(Protocol):
    """A stage of a run."""

    @property
    def title(self) -> str:
        """What tables call it."""
        ...

    def model(self) -> nn.Module:
        """Return the stage's model."""
        ...


class Task(Protocol):
    """What a task provides."""

    @property
    def metric(self) -> Metric:
        """The figure it is judged by."""
        ...

    def open(self, spec: str) -> ImageSource:
        """Return the images that a data specification names, as this task reads it."""
        ...

    def check(self, source: ImageSource | None, model: nn.Module) -> None:
        """Check that data, model and options fit together; take from them what the options leave open.

        Raises:
            GossamerError: They do not; says what to change.
        """
        ...

    def configure(self, data: DataSettings) -> dict[str, Any]:
        """Take the task's own settings from a recipe's ``data``; return options of the training ``StepLoader``.

        Raises:
            RecipeError: A setting that means nothing to this task.
        """
        ...

    def train_view(self, pre: Preprocessing, data: DataSettings) -> Transform:
        """Return the random view of a picture that training sees: a tensor, or a batch's tensors by name."""
        ...

    def still_view(self, pre: Preprocessing) -> Transform:
        """Return the view that searches and calibrations see: as deployment will, all of one size."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Any, Terms]:
        """Run the model on a batch; return its output and the loss terms."""
        ...

    def batches(self, source: ImageSource, pre: Preprocessing, batch: int) -> Iterator[Batch]:
        """Yield every readable image once, as ``evaluate`` takes them."""
        ...

    def evaluate(self, predict: Predict, batches: Iterable[Batch]) -> Evaluation:
        """Score a model.

        Raises:
            DataError: No images, or images that do not fit.
        """
        ...

    def compare(self, reference: Any, other: Any) -> dict[str, Any]:
        """Return figures of two evaluations on the same images, the reference first; plain JSON."""
        ...

    def gallery(self, stages: Sequence[HasModel], source: ImageSource, pre: Preprocessing) -> list[dict[str, Any]]:
        """Return pictures for the report: ``{name, note, pictures: [{title, image (data URI), note}]}``."""
        ...


class _Predict:
    def __init__(self, call: Any, size: tuple[int, int, int] | None) -> None:
        self._call, self.size = call, size

    def __call__(self, images: Tensor) -> Tensor:
        out = self._call(images)
        out = out if isinstance(out, Tensor) else torch.from_numpy(np.asarray(out))
        return out.detach().float().cpu()


def predict_with(call: Any, size: tuple[int, int, int] | None = None) -> Predict:
    """Return a function of images as a ``Predict``; arrays become tensors."""
    return _Predict(call, size)


def in_evaluation(model: nn.Module, read: Callable[[Any], Tensor] = lambda out: out) -> Predict:
    """Return a model as a ``Predict`` in evaluation mode; its modules' training flags are as before each time.

    Args:
        model: The model.
        read: Its output to the tensor that counts.
    """

    def call(images: Tensor) -> Tensor:
        first = next((t for t in (*model.parameters(), *model.buffers())), None)  # integer layers hold buffers alone
        with evaluating(model), torch.no_grad():
            return read(model(images if first is None else images.to(first.device)))

    return _Predict(call, None)


def picture_uri(pixels: np.ndarray, repeat: int = 1) -> str:
    """Return a picture, uint8 [H, W, 1 or 3], each pixel repeated along both sides, as a PNG data URI."""
    large = pixels.repeat(repeat, 0).repeat(repeat, 1)
    stream = io.BytesIO()
    Image.fromarray(large[..., 0] if large.shape[2] == 1 else large).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
