"""Image translation: pictures of one domain to pictures of another, with pairs or without.

Generators take and give pictures in [-1, 1]. They are judged by the distance of their pictures to real ones of the
second domain, in features of a stated network (``tasks.features``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError, nearest
from gossamer.core.schedule import Batch, Terms
from gossamer.data.images import ImageSource
from gossamer.data.loading import batches as image_batches
from gossamer.data.pairs import PairTransform, is_paired, open_pairs, serial
from gossamer.models.preprocessing import Preprocessing
from gossamer.recipe import DataSettings
from gossamer.tasks.features import (
    INCEPTION,
    STAND_IN,
    Distances,
    Extractor,
    distances,
    diversity,
    load_extractor,
)
from gossamer.tasks.task import HasModel, Metric, Predict, in_evaluation, picture_uri

__all__ = ["ImageTranslation", "Translation", "to_unit"]

AUGMENT = ("load", "flip")
SHOWN, LEAST = 6, 128


def to_unit(pictures: Tensor) -> Tensor:
    """Return pictures in [-1, 1] as pictures in [0, 1]."""
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Translation:
    """Scores of a generator on a set of pictures.

    Attributes:
        distances: FID and KID, with the network they are taken with.
        diversity: Mean cosine distance of the features of two generated pictures; near 0 where a generator has
            collapsed.
        l1: Mean absolute error against the paired picture, of values in [0, 1]; ``None`` without pairs.
        features: [N, D] of the generated pictures.
        names: Names of the N pictures.
    """

    distances: Distances
    diversity: float
    l1: float | None
    features: Tensor
    names: list[str]

    @property
    def score(self) -> float:
        """The Frechet distance."""
        return self.distances.fid

    @property
    def score_interval(self) -> None:
        """None: the distance is of whole sets."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures without the features."""
        own = {"images": len(self.names), **self.distances.to_json(), "diversity": self.diversity}
        return own if self.l1 is None else {**own, "l1": self.l1}


@dataclass
class ImageTranslation:
    """Pixel error where pictures are paired; without pairs, methods bring the loss.

    Attributes:
        paired: Whether picture i of one domain belongs to picture i of the other; ``None``: as the form of the
            data says (``data.pairs.open_pairs``), pairs where there is none.
        extractor: Network of FID and KID: ``inception@WEIGHTS`` (the standard one), ``name@WEIGHTS`` or a saved
            folder; the default comes with the package, and its figures are no standard FID.
        out_chans: Channels of the second domain; ``check`` takes them from the generator where it says.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}  # the loaded network

    paired: bool | None = None
    extractor: str = STAND_IN
    out_chans: int = 3
    _loaded: Extractor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def metric(self) -> Metric:
        """The Frechet distance, named after its network."""
        network = self.extractor.partition("@")[0]
        name = "FID" if network == INCEPTION else f"FID of {network} features"
        return Metric("fid", name, "", False, "Frechet distance of the features of generated and real pictures")

    # -- data --------------------------------------------------------------------------------------
    def open(self, spec: str) -> ImageSource:
        """Return the pairs that ``spec`` names (``data.pairs.open_pairs``)."""
        source = open_pairs(spec, paired=self.paired)
        self.paired = is_paired(source)
        return source

    def check(self, source: ImageSource | None, model: nn.Module) -> None:
        """Check that the feature network can be had; take pairing and channels where the options leave them open.

        Raises:
            RecipeError: No weights for the feature network.
            ModelError: They are of another network.
            DataError: A single picture, of which there are no distances.
        """
        self.out_chans = int(getattr(model, "options", {}).get("out_chans", self.out_chans))
        if source is not None:
            if len(source) < 2:
                raise DataError(f"{source.what}: 1 picture; FID and KID need at least 2, and mean little below 2,000")
            self._features()
            self.paired = is_paired(source) if self.paired is None else self.paired

    @property
    def _pairs(self) -> bool:
        return self.paired is not False

    def configure(self, data: DataSettings) -> dict[str, Any]:
        """Refuse what mixes labels; nothing else is taken.

        Raises:
            RecipeError: Mixup, cutmix or label smoothing.
        """
        for name in ("mixup", "cutmix", "smoothing"):
            if getattr(data, name):
                raise RecipeError(f"data.{name}={getattr(data, name)}: pictures have no labels to mix; leave it out")
        return {}

    def train_view(self, pre: Preprocessing, data: DataSettings) -> PairTransform:
        """Return the random view: resized to ``load`` times the size, cropped, flipped (``data.augment``).

        Raises:
            RecipeError: Unknown option or a value out of range.
        """
        for key in data.augment:
            if key not in AUGMENT:
                raise RecipeError(
                    f"augment option {key!r} is unknown; options are {', '.join(AUGMENT)}{nearest(key, AUGMENT)}"
                )
        return PairTransform(pre, self.out_chans, training=True, paired=self._pairs, **data.augment)

    def still_view(self, pre: Preprocessing) -> PairTransform:
        """Return the view that a generator is evaluated with: resized to its size."""
        return PairTransform(pre, self.out_chans, paired=self._pairs)

    def batches(self, source: ImageSource, pre: Preprocessing, batch: int) -> Iterator[Batch]:
        """Yield every readable pair once; unpaired domains side by side, the smaller one again from its start."""
        return image_batches(serial(source), self.still_view(pre), batch)

    # -- training and evaluation -------------------------------------------------------------------
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Any, Terms]:
        """Run the generator; return its pictures and ``{"task": mean absolute error}``, no term without pairs.

        Raises:
            ModelError: The output has another shape than the target.
        """
        out = model(batch["image"])
        if not self._pairs:
            return out, {}
        if out.shape != batch["target"].shape:
            raise ModelError(
                f"{type(model).__name__} puts out {tuple(out.shape)}, the paired pictures are "
                f"{tuple(batch['target'].shape)}; expected the same"
            )
        return out, {"task": F.l1_loss(out.float(), batch["target"].float())}

    def _features(self) -> Extractor:
        if self._loaded is None:
            self._loaded = load_extractor(self.extractor)
        return self._loaded

    def evaluate(self, predict: Predict, batches: Iterable[Batch]) -> Translation:
        """Score a generator; pictures of an unpaired domain that come again count once.

        Raises:
            DataError: Fewer than two pictures.
            RecipeError: No weights for the feature network.
        """
        extractor = self._features()
        device = extractor.mean.device
        made: list[Tensor] = []
        real: list[Tensor] = []
        errors: list[Tensor] = []
        names: list[str] = []
        seen: tuple[set[str], set[str]] = (set(), set())
        for batch in batches:
            pictures, target = to_unit(predict(batch["image"])), to_unit(batch["target"].cpu())
            if self._pairs:
                errors.append((pictures - target).abs().flatten(1).mean(1))
            fresh = [_fresh(name, seen) for name in batch["id"]]
            for new, values, found in ((0, pictures, made), (1, target, real)):
                keep = torch.tensor([f[new] for f in fresh], dtype=torch.bool)
                if keep.any():
                    found.append(extractor(values[keep].to(device)).cpu())
            names += [name.partition(" -> ")[0] for name, f in zip(batch["id"], fresh, strict=True) if f[0]]
        if not made:
            raise DataError("evaluation got 0 images; expected at least 2")
        features = torch.cat(made)
        scores = distances(features, torch.cat(real), extractor.name)
        error = float(torch.cat(errors).mean()) if errors else None
        return Translation(scores, diversity(features), error, features, names)

    def compare(self, reference: Translation, other: Translation) -> dict[str, Any]:
        """Return the mean cosine of the features of both generators' pictures, and the differences of the figures."""
        like = F.cosine_similarity(reference.features, other.features).mean()
        figures: dict[str, Any] = {
            "images": len(reference.names),
            "feature_cosine": float(like),
            "fid_difference": other.distances.fid - reference.distances.fid,
            "kid_difference": other.distances.kid - reference.distances.kid,
        }
        return figures

    def gallery(self, stages: Sequence[HasModel], source: ImageSource, pre: Preprocessing) -> list[dict[str, Any]]:
        """Return, for the first few pictures: input, what each stage makes of it, and the real one where paired."""
        models = [(s.title, in_evaluation(s.model())) for s in stages]
        groups: list[dict[str, Any]] = []
        for batch in self.batches(source, pre, 1):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pre.mean, pre.std))
            shown = [("input", (batch["image"][0] * std + mean).clamp(0, 1))]
            shown += [(title, to_unit(predict(batch["image"]))[0]) for title, predict in models]
            if self._pairs:
                shown.append(("real", to_unit(batch["target"])[0]))
            pictures = [{"title": title, "image": _shown(pixels)} for title, pixels in shown]
            groups.append({"name": batch["id"][0], "note": "", "pictures": pictures})
            if len(groups) == SHOWN:
                break
        return groups


def _fresh(name: str, seen: tuple[set[str], set[str]]) -> tuple[bool, bool]:
    """Return whether the first and the second picture of ``name`` are new; note them."""
    first, arrow, second = name.partition(" -> ")
    if not arrow:
        return True, True
    new = first not in seen[0], second not in seen[1]
    seen[0].add(first)
    seen[1].add(second)
    return new


def _shown(pixels: Tensor) -> str:
    """Return a picture [C, H, W] in [0, 1] as a data URI; small ones are enlarged."""
    values = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
    return picture_uri(values, max(1, round(LEAST / max(values.shape[:2]))))
