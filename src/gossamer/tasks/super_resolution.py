"""Single-image super-resolution: patches from photographs, L1 loss, PSNR and SSIM on the luma."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import DataError, RecipeError
from gossamer.core.schedule import Batch, Terms
from gossamer.data.images import BrokenImage, ImageSource, Remembered
from gossamer.data.patches import PatchPair, degrade, to_pixels, to_tensor
from gossamer.data.resize import crop_to_multiple, imresize
from gossamer.data.sources import open_data
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.recipe import DataSettings
from gossamer.tasks.image_quality import WINDOW, cut_border, luma, psnr, ssim
from gossamer.tasks.task import HasModel, Metric, Predict, in_evaluation, picture_uri
from gossamer.tasks.tiling import enlarge

__all__ = ["SCALES", "Restored", "SuperResolution", "scale_of"]

SCALES = (2, 3, 4)
LOSSES = ("l1", "l2")
_SHOWN, _CROP = 3, 96
_ROUNDS = 2000


def scale_of(model: nn.Module | Preprocessing) -> int | None:
    """Return the scale that a model, or its preprocessing, states."""
    pre = model if isinstance(model, Preprocessing) else preprocessing(model)
    found = pre.task.get("super_resolution", {}).get("scale")
    return None if found is None else int(found)


@dataclass(frozen=True)
class Restored:
    """Figures of enlarged pictures against the originals.

    Attributes:
        names: Names of the pictures.
        psnrs: PSNR of each on the luma, dB.
        ssims: SSIM of each on the luma.
        pictures: The enlarged pictures, uint8 [H, W, 3].
        border: Pixels that were cut at each edge.
    """

    names: list[str]
    psnrs: list[float]
    ssims: list[float]
    pictures: list[np.ndarray] = field(repr=False)
    border: int

    @property
    def score(self) -> float:
        """Mean PSNR over the pictures, dB."""
        return sum(self.psnrs) / len(self.psnrs)

    @property
    def score_interval(self) -> None:
        """None: pictures differ by decibels; differences of two models on the same ones have an interval."""
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {"images": len(self.names), "psnr_y": self.score, "ssim_y": sum(self.ssims) / len(self.ssims)}


@dataclass
class SuperResolution:
    """Super-resolution by one factor.

    Attributes:
        scale: 2, 3 or 4; default: the model's.
        patch: Side of the low-resolution patches of training (papers: 48; the target is ``scale`` times as large).
        loss_kind: ``"l1"`` or ``"l2"`` (mean squared error), in grey levels 0..255 as papers train.
        border: Pixels cut at each edge before a figure is computed; default ``scale``.
        round_luma: Round the luma to whole numbers before, as MATLAB does.
    """

    metric: ClassVar[Metric] = Metric(
        "psnr_y", "PSNR", "dB", True, "Mean over the pictures, on the luma, borders of the scale cut"
    )

    scale: int | None = None
    patch: int = 48
    loss_kind: str = "l1"
    border: int | None = None
    round_luma: bool = False

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale not in SCALES:
            raise RecipeError(f"task super_resolution: scale={self.scale}; allowed are {', '.join(map(str, SCALES))}")
        if self.loss_kind not in LOSSES or self.patch < 1 or (self.border or 0) < 0:
            raise RecipeError(
                f"task super_resolution: loss_kind={self.loss_kind!r}, patch={self.patch}, border={self.border}; "
                f"allowed are {', '.join(LOSSES)}, 1 or more, 0 or more"
            )

    @property
    def factor(self) -> int:
        """The scale, known by now.

        Raises:
            RecipeError: Neither options nor model say it.
        """
        if self.scale is None:
            raise RecipeError("task super_resolution: no scale is known; write task: {super_resolution: {scale: 2}}")
        return self.scale

    @property
    def _border(self) -> int:
        return self.factor if self.border is None else self.border

    # -- data --------------------------------------------------------------------------------------
    def open(self, spec: str) -> ImageSource:
        """Return photographs: any pictures below a folder or in an archive; labels play no part.

        Patches are drawn from the same ones again and again: they stay decoded, up to half a gigabyte.
        """
        source = open_data(spec, labelled=False)
        return ImageSource(source.names, source.labels, Remembered(source._read), source.classes, source.what)

    def check(self, source: ImageSource | None, model: nn.Module) -> None:
        """Take the model's scale, or check that it is the one asked for.

        Raises:
            RecipeError: The model has another scale.
        """
        own = scale_of(model)
        if self.scale is None:
            self.scale = own
        asked = self.factor
        if own is not None and asked != own:
            raise RecipeError(
                f"task super_resolution: scale {asked} was asked for, {type(model).__name__} enlarges by {own}; "
                f"name a model of scale {self.factor}, or scale={own}"
            )

    def configure(self, data: DataSettings) -> dict[str, Any]:
        """Refuse what is for labels; patches need no options of a loader.

        Raises:
            RecipeError: Mixing, smoothing or augmentation of a classifier.
        """
        given = [k for k in ("mixup", "cutmix", "smoothing", "augment") if getattr(data, k)]
        if given:
            raise RecipeError(
                f"data.{given[0]}: means nothing in super-resolution (patches are flipped and turned); leave it out"
            )
        return {}

    def train_view(self, pre: Preprocessing, data: DataSettings) -> PatchPair:
        """Return random patches, flipped and turned."""
        return PatchPair(self.factor, self.patch, True)

    def still_view(self, pre: Preprocessing) -> PatchPair:
        """Return the patch in the middle, of the size that exported graphs take where the photograph has it."""
        return PatchPair(self.factor, pre.size[1], False)

    def batches(self, source: ImageSource, pre: Preprocessing, batch: int) -> Iterator[Batch]:
        """Yield one photograph at a time that figures can be had of: low resolution [1, 3, h, w], original of scale."""
        least = WINDOW + 2 * self._border
        for i in range(len(source)):
            try:
                sample = source[i]
            except BrokenImage as err:
                source.record([(err.name, err.reason)])
                continue
            high = crop_to_multiple(np.asarray(sample.image), self.factor)
            if min(high.shape[:2]) < least:
                size = f"{sample.image.width}x{sample.image.height} pixels"
                source.record([(sample.name, f"{size}; figures need at least {least}x{least}")])
                continue
            low = degrade(high, self.factor)
            yield {"image": to_tensor(low)[None], "target": to_tensor(high)[None], "id": [sample.name]}

    # -- training ----------------------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Terms]:
        """Run the model; return its output and the mean absolute (or squared) error in grey levels 0..255."""
        out = model(batch["image"])
        error = 255 * (out.float() - batch["target"])
        return out, {"task": error.abs().mean() if self.loss_kind == "l1" else error.square().mean()}

    # -- figures -----------------------------------------------------------------------------------
    def evaluate(self, predict: Predict, batches: Iterable[Batch]) -> Restored:
        """Enlarge every picture (in tiles where the model takes one size only) and compare with the originals.

        Outputs are clipped and rounded to 8 bits before.

        Raises:
            DataError: No pictures, or one with nothing left inside its borders.
        """
        border = self._border
        names: list[str] = []
        pictures: list[np.ndarray] = []
        figures: list[tuple[float, float]] = []
        for batch in batches:
            low, high = to_pixels(batch["image"][0]), to_pixels(batch["target"][0])
            large = enlarge(predict, low, self.factor)
            planes = [cut_border(luma(p, whole=self.round_luma), border) for p in (large, high)]
            figures.append((psnr(*planes), ssim(*planes)))
            pictures.append(large)
            names.extend(batch["id"])
        if not names:
            raise DataError("evaluation got 0 images; expected at least 1")
        psnrs, ssims = (list(column) for column in zip(*figures, strict=True))
        return Restored(names, psnrs, ssims, pictures, border)

    def compare(self, reference: Restored, other: Restored) -> dict[str, Any]:
        """Return the mean difference in dB with its bootstrap interval, and how close the pictures themselves are."""
        pairs = [(b - a) for a, b in zip(reference.psnrs, other.psnrs, strict=True) if math.isfinite(b - a)]
        gap = torch.tensor(pairs or [0.0], dtype=torch.double)
        draw = torch.Generator().manual_seed(0)
        means = gap[torch.randint(len(gap), (_ROUNDS, len(gap)), generator=draw)].mean(1)
        ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double))
        alike = [psnr(a, b) for a, b in zip(reference.pictures, other.pictures, strict=True)]
        finite = [v for v in alike if math.isfinite(v)]
        return {
            "images": len(pairs),
            "difference_db": float(gap.mean()),
            "interval_db": [float(e) for e in ends],
            "psnr_to_reference": sum(finite) / len(finite) if finite else None,
        }

    # -- report ------------------------------------------------------------------------------------
    def gallery(self, stages: Sequence[HasModel], source: ImageSource, pre: Preprocessing) -> list[dict[str, Any]]:
        """Return a part of some photographs: bicubic, by the first and the last stage, original; the same pixels."""
        shown = [(stages[0].title, stages[0].model())] + [(s.title, s.model()) for s in stages[1:][-1:]]
        groups = []
        for batch in self.batches(source, pre, 1):
            low, high = to_pixels(batch["image"][0]), to_pixels(batch["target"][0])
            versions = [("bicubic", imresize(low, float(self.factor)))]
            versions += [(title, enlarge(in_evaluation(model), low, self.factor)) for title, model in shown]
            border = self._border
            target = cut_border(luma(high), border)
            pictures = [
                {
                    "title": t,
                    "note": f"{psnr(cut_border(luma(p), border), target):.2f} dB",
                    "image": picture_uri(_middle(p), 2),
                }
                for t, p in versions
            ]
            groups.append(
                {
                    "name": batch["id"][0],
                    "note": f"Enlarged {self.factor} times; the part in the middle, figures of the whole picture.",
                    "pictures": [*pictures, {"title": "original", "image": picture_uri(_middle(high), 2)}],
                }
            )
            if len(groups) == _SHOWN:
                break
        return groups


def _middle(pixels: np.ndarray) -> np.ndarray:
    high, wide = (min(_CROP, n) for n in pixels.shape[:2])
    top, left = (pixels.shape[0] - high) // 2, (pixels.shape[1] - wide) // 2
    return pixels[top : top + high, left : left + wide]
