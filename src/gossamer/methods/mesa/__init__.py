"""Mesa: training with saved activations in bytes."""

from gossamer.methods.mesa.method import Mesa

__all__ = ["Mesa"]
