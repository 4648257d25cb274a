"""A small case of CycleGAN, for the conformance suite."""

from gossamer.kits.example import MethodExample, tiny_generator, translation_example
from gossamer.methods.cyclegan.method import CycleGAN

__all__ = ["example"]


def example() -> MethodExample:
    """Return narrow generators and judges with a pool that fills and overflows in three steps."""
    return translation_example(method=lambda: CycleGAN(ndf=4, layers=1, pool=5), model=tiny_generator, paired=False)
