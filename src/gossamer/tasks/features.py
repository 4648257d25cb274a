"""What an image set is like, as features of a stated network: for FID, KID and diversity.

Figures depend on the network. ``inception@WEIGHTS`` with the field's weights gives the standard FID and KID;
any other network is a stand-in, and its figures carry its name.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.models.build import load_model
from gossamer.models.fid_inception import SIZE, fid_inception
from gossamer.models.preprocessing import preprocessing
from gossamer.models.store import is_saved
from gossamer.models.weights import fill, read_weights
from gossamer.ops.distances import frechet_distance, kernel_distance, kernel_distances, moments

__all__ = ["INCEPTION", "STAND_IN", "Distances", "Extractor", "distances", "diversity", "load_extractor"]

INCEPTION = "inception"
STAND_IN = "vit_tiny_patch16_224@embedded"
"""The extractor that ships with the package."""
HOW = (
    "give the standard one as 'inception@pt_inception-2015-12-05.safetensors' (weights of the pytorch-fid project, "
    'converted: python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True), "
    "'pt_inception-2015-12-05.safetensors')\"), or a stand-in that figures will name, such as "
    f"'tf_efficientnet_lite0@weights.safetensors' or {STAND_IN!r} (comes with gossamer)"
)
"""How to name a feature network, for messages."""
ENOUGH = 2000
"""Images below which the covariance of the usual features is mostly noise; papers use 5,000 to 50,000."""
SUBSETS, LARGEST = 20, 1000
"""Subsets over which the spread of KID is taken, and images of one at most."""


class Extractor(nn.Module):
    """Images in [0, 1] to features, in evaluation mode and without gradients.

    Args:
        net: The network; its ``features`` are taken as ``load_extractor`` says.
        name: What figures call it.
        size: Side that images are resized to.
        mean: Subtracted, by channel.
        std: Divisor, by channel.
        interpolation: ``"bilinear"`` (not antialiased, as FID is defined) or ``"bicubic"`` (antialiased).
    """

    mean: Tensor
    std: Tensor

    def __init__(  # noqa: PLR0913 - the parts of a network's preprocessing
        self, net: nn.Module, name: str, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...],
        interpolation: str = "bicubic",
    ) -> None:  # fmt: skip
        super().__init__()
        self.net, self.name, self.size, self.interpolation = net.eval().requires_grad_(False), name, size, interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def standard(self) -> bool:
        """Whether this is the network that FID and KID are defined with."""
        return self.name == INCEPTION

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, D], float32, of images [B, 1 or 3, H, W] in [0, 1]."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if tuple(images.shape[-2:]) != self.size:
            smooth = self.interpolation != "bilinear"
            images = F.interpolate(images, self.size, mode=self.interpolation, antialias=smooth, align_corners=False)
        x = (images - self.mean) / self.std
        if self.standard:
            return self.net(x).float()
        pooled = getattr(self.net, "forward_head", None)
        seen = self.net.forward_features(x)  # type: ignore[operator]
        return (pooled(seen, pre_logits=True) if pooled is not None else seen).flatten(1).float()


def load_extractor(spec: str | None) -> Extractor:
    """Return the feature network that ``spec`` names.

    Args:
        spec: ``inception@WEIGHTS.safetensors``: the network of the standard FID, 2048 features. Any other
            ``name@WEIGHTS`` or saved folder: a timm model, its features before the classifier, images in its own
            size and normalisation.

    Raises:
        RecipeError: No spec, or one without weights; says how to give them.
        ModelError: The weights are missing, unreadable or of another network.
    """
    name, at, weights = (spec or "").partition("@")
    if not spec or not (weights if at else is_saved(spec)):
        raise RecipeError(f"extractor={spec!r}: FID and KID need trained features; {HOW}")
    if name == INCEPTION:
        net = fid_inception()
        try:
            fill(net, read_weights(weights), repr(weights))
        except ModelError as err:
            raise ModelError(f"extractor {spec!r}: {err}; {HOW}") from None
        net.fc = nn.Identity()  # type: ignore[assignment]
        return Extractor(net, INCEPTION, (SIZE, SIZE), (0.5,) * 3, (0.5,) * 3, "bilinear")
    net = load_model(spec)
    if not hasattr(net, "forward_features"):
        raise ModelError(f"extractor {spec!r}: {type(net).__name__} has no forward_features; {HOW}")
    pre = preprocessing(net)
    return Extractor(net, name, (pre.size[1], pre.size[2]), tuple(pre.mean), tuple(pre.std))


@dataclass(frozen=True)
class Distances:
    """How far a set of generated images is from a set of real ones.

    Attributes:
        extractor: Name of the feature network; ``"inception"`` is the standard one.
        generated: Number of generated images.
        real: Number of real images.
        fid: Frechet distance of the features.
        kid: Kernel distance of all images (unbiased; published figures are 1000 times as large at times).
        kid_std: Spread of the kernel distance over 20 subsets of half the images (1,000 at most).
    """

    extractor: str
    generated: int
    real: int
    fid: float
    kid: float
    kid_std: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def distances(generated: Tensor, real: Tensor, extractor: str) -> Distances:
    """Compare features [N, D] of generated and [M, D] of real images.

    Raises:
        DataError: Fewer than 2 images on a side.
    """
    n, m, d = len(generated), len(real), generated.shape[1]
    if min(n, m) < 2:
        raise DataError(f"FID and KID of {n} generated and {m} real images; expected at least 2 of each")
    if min(n, m) < max(ENOUGH, d + 1):
        warnings.warn(
            f"FID of {n} generated and {m} real images with {d} features: fewer than {max(ENOUGH, d + 1)} images bias "
            f"it upwards and make it noisy; compare only figures of equal numbers of images, or use KID",
            stacklevel=2,
        )
    half = max(2, min(n, m, 2 * LARGEST) // 2)
    spread = kernel_distances(generated, real, subsets=SUBSETS, size=half).std()
    fid = frechet_distance(moments(generated), moments(real))
    return Distances(extractor, n, m, fid, kernel_distance(generated, real), float(spread))


def diversity(features: Tensor) -> float:
    """Return the mean cosine distance, in [0, 2], between the features [N, D] of two different images, N >= 2."""
    unit = F.normalize(features.double(), dim=1)
    n = len(unit)
    return float(1 - (unit.sum(0).square().sum() - n) / (n * (n - 1)))
