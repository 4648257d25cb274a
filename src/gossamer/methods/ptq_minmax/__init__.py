"""Max-abs and percentile post-training quantization: the baseline."""

from gossamer.methods.ptq_minmax.method import PTQMinMax

__all__ = ["PTQMinMax"]
