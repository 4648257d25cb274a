"""Plain quantization-aware training with learned clips."""

from gossamer.methods.qat.method import QAT

__all__ = ["QAT"]
