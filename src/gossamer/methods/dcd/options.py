"""The options of DCD: one place for their meaning and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gossamer.core.errors import RecipeError, nearest
from gossamer.ops.adversarial import GAN_KINDS

__all__ = ["Released", "check_options", "released"]

CHOICES: dict[str, tuple[str, ...]] = {
    "features": ("dcd", "images", "raw", "none"),
    "connector": ("conv_bn_relu", "conv"),
    "d_fakes": ("both", "teacher", "student"),
    "schedule": ("joint", "progressive"),
    "gan": GAN_KINDS,
}
WEIGHTS = ("lambda_dcd", "lambda_style", "lambda_feature", "lambda_gan", "lambda_task", "lambda_recon")


@dataclass(frozen=True)
class Released:
    """What the released scripts choose for a kind of data.

    Attributes:
        gan: Adversarial loss.
        ndf: Channels of the discriminators' first layer.
        schedule: How teacher and student take turns.
    """

    gan: str
    ndf: int
    schedule: str


def released(paired: bool) -> Released:
    """Return the released choices: pix2pix scripts for pairs, CycleGAN scripts without."""
    return Released("hinge", 128, "joint") if paired else Released("lsgan", 64, "progressive")


def check_options(method: Any) -> None:
    """Check the values of a ``DCD``.

    Raises:
        RecipeError: A value is out of range; says which are allowed.
    """
    for name, allowed in CHOICES.items():
        value = getattr(method, name)
        if value is not None and value not in allowed:
            raise RecipeError(f"dcd: {name}={value!r}; allowed are {', '.join(allowed)}{nearest(str(value), allowed)}")
    for name in WEIGHTS:
        if not getattr(method, name) >= 0:
            raise RecipeError(f"dcd: {name}={getattr(method, name)}; expected 0 or more")
    features = method.lambda_dcd if method.features != "none" else 0.0
    pixels = method.lambda_task if method.paired else 0.0
    if not any((method.lambda_style, method.lambda_feature, method.lambda_gan, features, pixels)):
        raise RecipeError(
            "dcd: nothing for the student to learn from; set lambda_style, lambda_feature, lambda_gan, lambda_dcd "
            "(with features other than none) or, for pairs, lambda_task above 0"
        )
    for name in ("every", "cycles", "select_images"):
        if getattr(method, name) < 1:
            raise RecipeError(f"dcd: {name}={getattr(method, name)}; expected at least 1")
    if not method.student_ratio > 0:
        raise RecipeError(f"dcd: student_ratio={method.student_ratio}; expected more than 0")
    if method.taps is not None and not method.taps:
        raise RecipeError("dcd: taps is empty; name features to compare, or set features: none")
    if method.taps is not None and not _are_taps(method.taps):
        raise RecipeError(
            f"dcd: taps={method.taps!r}; expected numbers of features, or pairs of module paths "
            f"[[student, teacher], ...]"
        )


def _are_taps(given: Any) -> bool:
    """Return whether these are numbers, or pairs of module paths, and not a mixture."""
    if not isinstance(given, (list, tuple)):
        return False
    if all(isinstance(tap, int) for tap in given):
        return True
    return all(isinstance(tap, (list, tuple)) and [type(path) for path in tap] == [str, str] for tap in given)
