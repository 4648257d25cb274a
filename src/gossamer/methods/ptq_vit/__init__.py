"""Post-training quantization for vision transformers (arXiv 2106.14156)."""

from gossamer.methods.ptq_vit.method import PTQViT

__all__ = ["PTQViT"]
