"""AutoProg: networks that grow while they train."""

from gossamer.methods.autoprog.method import AutoProg

__all__ = ["AutoProg"]
