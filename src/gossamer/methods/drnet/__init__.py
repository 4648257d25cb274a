"""DRNet: dynamic resolution network."""

from gossamer.methods.drnet.method import DRNet

__all__ = ["DRNet"]
