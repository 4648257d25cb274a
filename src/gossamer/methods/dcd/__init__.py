"""Discriminator-cooperated feature map distillation for GAN compression (arXiv 2212.14169)."""

from gossamer.methods.dcd.method import DCD

__all__ = ["DCD"]
