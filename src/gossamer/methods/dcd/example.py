"""A small case of DCD, for the conformance suite."""

from torch import Tensor, nn

from gossamer.kits.example import MethodExample, translation_example
from gossamer.methods.dcd.method import DCD

__all__ = ["example"]


class _Coarse(nn.Module):
    """A feature network: pictures in 2 x 2 pixels, and what comes before the last halving as perceptual features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return [B, 3, 2, 2]."""
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, 12]."""
        return self.forward_features(x).flatten(1)


def example() -> MethodExample:
    """Return a progressive run: two cycles of teacher, selection and student, every term at work."""
    seer = _Coarse()
    return translation_example(
        method=lambda: DCD(
            width=2, schedule="progressive", layers=1, ndf=4, cycles=2, student_ratio=1.0, select=seer, select_images=6,
            perceptual=seer, perceptual_paths=["first", "second"], lambda_style=10.0, lambda_feature=1.0,
        ),
        neutral=lambda: DCD(
            features="none", lambda_style=0.0, lambda_feature=0.0, lambda_gan=0.0, lambda_task=1.0, layers=1, ndf=4
        ),
        steps=2,
    )  # fmt: skip
