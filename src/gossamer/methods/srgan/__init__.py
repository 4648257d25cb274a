"""SRGAN: adversarial training of a super-resolution generator."""

from gossamer.methods.srgan.method import SRGAN

__all__ = ["SRGAN"]
