"""AdderNet: convolutional networks without multiplications."""

from gossamer.methods.addernet.method import AdderNet

__all__ = ["AdderNet"]
