"""Unpaired image-to-image translation using cycle-consistent adversarial networks (arXiv 1703.10593)."""

from gossamer.methods.cyclegan.method import CycleGAN

__all__ = ["CycleGAN"]
