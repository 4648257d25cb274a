"""Image-to-image translation with conditional adversarial networks (arXiv 1611.07004)."""

from gossamer.methods.pix2pix.method import Pix2Pix

__all__ = ["Pix2Pix"]
