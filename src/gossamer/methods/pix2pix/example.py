"""A small case of pix2pix, for the conformance suite."""

from gossamer.kits.example import MethodExample, tiny_generator, translation_example
from gossamer.methods.pix2pix.method import Pix2Pix

__all__ = ["example"]


def example() -> MethodExample:
    """Return a narrow generator against a narrow judge; without the judge it is plain regression."""
    return translation_example(
        method=lambda: Pix2Pix(ndf=4, layers=1),
        neutral=lambda: Pix2Pix(ndf=4, layers=1, lambda_gan=0.0, lambda_recon=1.0),
        model=tiny_generator,
    )
