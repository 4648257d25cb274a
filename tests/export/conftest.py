"""A small ViT, in float and in 8 bits with steps from the largest values on random images."""

import pytest
import timm
import torch
from torch import nn

from gossamer.models.contracts import replace_module
from gossamer.models.timm_adapter import attention_views, open_attention
from gossamer.ops.attention import MatMul
from gossamer.ops.int8 import Int8Conv2d, Int8Linear, Int8MatMul


class Watched(MatMul):
    """A product that the fused kernel must not replace, so that its operands can be seen."""


def _in_8_bits(model, *, scales=3, unsigned_softmax=True):
    """Return ``model`` with every layer and attention product in 8 bits."""
    for view in attention_views(model):
        attention = open_attention(model, view.name)
        attention.scores, attention.values = Watched(), Watched()
    tops = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: tops.update({n: [float(a.abs().max()) for a in args]}))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d | MatMul)
    ]
    size = model.patch_embed.img_size
    with torch.no_grad():
        model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)))
    for hook in hooks:
        hook.remove()
    for name, top in tops.items():
        old = model.get_submodule(name)
        if isinstance(old, MatMul):
            plain = name.endswith("values") and unsigned_softmax
            new = Int8MatMul.from_scales(top[0] / (255 if plain else 127), top[1] / 127, signed=(not plain, True))
        else:
            count = scales if name.endswith("qkv") else 1
            step = old.weight.detach().reshape(count, -1).abs().amax(1) / 127
            form = Int8Linear if isinstance(old, nn.Linear) else Int8Conv2d
            new = form.from_scales(old, step, top[0] / 127)
        replace_module(model, name, new)
    return model


def _small_vit(name="vit_tiny_patch16_224", **options):
    """Return a small model with biases that are not zero."""
    torch.manual_seed(0)
    given = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10} | options
    model = timm.create_model(name, **given).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def in_8_bits():
    """The function that quantizes a model."""
    return _in_8_bits


@pytest.fixture
def small_vit():
    """The function that builds a small float model."""
    return _small_vit


@pytest.fixture
def vit():
    """A small float model."""
    return _small_vit()


@pytest.fixture
def vit8():
    """A small 8-bit model."""
    return _in_8_bits(_small_vit())
