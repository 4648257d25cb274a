"""Vision transformers whose blocks have widths of their own: embedding, heads, queries, values, MLP.

``ViTWidths`` says how wide everything is, ``build_vit`` makes such a model from timm's parts, and
``redistribute`` is the rule that NViT (arXiv 2110.04869, section 4.4; release ``revit``) read off its
pruned models. Registered with timm: ``revit_tiny_patch16_224``, ``revit_small_patch16_224``, both also
``_distilled``, and ``hetero_vit_patch16_224`` (``widths={...}``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.models.contracts import replace_module
from gossamer.models.timm_adapter import attention_widths, token_view
from gossamer.ops.attention import OpenAttention

__all__ = ["ViTWidths", "build_vit", "redistribute", "widths_of"]

HEAD_WIDTH = 64
"""Width of a head in DeiT; the score scale stays that of this width (release)."""


@dataclass(frozen=True)
class ViTWidths:
    """How wide a vision transformer is; one entry a block where it is a tuple.

    Attributes:
        embed: Channels of a token.
        heads: Attention heads.
        qk: Width of a head's queries and keys.
        v: Width of a head's values.
        mlp: Hidden channels of the MLP.
    """

    embed: int
    heads: tuple[int, ...]
    qk: tuple[int, ...]
    v: tuple[int, ...]
    mlp: tuple[int, ...]

    def __post_init__(self) -> None:
        lists = {k: getattr(self, k) for k in ("heads", "qk", "v", "mlp")}
        depths = {len(x) for x in lists.values()}
        if len(depths) != 1 or min((self.embed, *(w for x in lists.values() for w in x)), default=0) < 1:
            raise ModelError(f"widths {asdict(self)}: expected lists of one length and numbers of 1 or more")

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.heads)

    def points(self) -> list[dict[str, int]]:
        """Return the widths block by block, by name."""
        rows = zip(self.heads, self.qk, self.v, self.mlp, strict=True)
        return [{"embed": self.embed, "heads": h, "qk": q, "v": v, "mlp": m} for h, q, v, m in rows]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ViTWidths:
        """Undo ``to_json``; one number for a list stands for all blocks.

        Raises:
            ModelError: A key is missing or unknown, or the lists do not fit together.
        """
        if set(data) != {"embed", "heads", "qk", "v", "mlp"}:
            raise ModelError(f"widths with keys {sorted(data)}; expected embed, heads, qk, v and mlp")
        depth = max((len(x) for x in data.values() if isinstance(x, Sequence)), default=1)
        lists = {k: tuple(x) if isinstance(x, Sequence) else (x,) * depth for k, x in data.items() if k != "embed"}
        return cls(int(data["embed"]), **lists)


def redistribute(embed: int) -> ViTWidths:
    """Return the widths of a ReViT of 12 blocks: wide in the middle, first and last attention wide.

    Source: release ``revit_scratch.py``. The ten heads of the outer blocks are the same for every width.

    Args:
        embed: Channels of a token (the release has 176 and 384).

    Raises:
        ModelError: ``embed`` so small that a block would be left without heads or queries.
    """
    a, b = round(0.005 * embed), round(embed / 160)
    if a < 1 or b < 1:
        raise ModelError(f"redistribute: embed={embed}; expected 101 or more, below that blocks have no heads")
    return ViTWidths(
        embed=embed,
        heads=(10, 2 * a, 2 * a, *[4 * a] * 6, 2 * a, 2 * a, 10),
        qk=(16 * b, 8 * b, 8 * b, *[16 * b] * 6, 8 * b, 8 * b, 16 * b),
        v=(HEAD_WIDTH,) * 12,
        mlp=(*[3 * embed] * 3, *[6 * embed] * 6, *[3 * embed] * 3),
    )


def widths_of(model: nn.Module) -> ViTWidths:
    """Return the widths of a plain vision transformer.

    Raises:
        ModelError: The model is of another kind, or an MLP is no two-layer MLP.
    """
    view = token_view(model)
    rows = [attention_widths(model.get_submodule(b.attention)) for b in view.blocks]
    heads, qk, v = zip(*rows, strict=True)
    mlp = []
    for block in view.blocks:
        last = getattr(model.get_submodule(block.mlp), "fc2", None)
        if not isinstance(last, nn.Linear):
            raise ModelError(f"MLP at {block.mlp!r} has no linear layer fc2; expected timm's Mlp or a gated one")
        mlp.append(last.in_features)
    return ViTWidths(view.width, heads, qk, v, tuple(mlp))


def _attention(old: Any, widths: ViTWidths, index: int) -> OpenAttention:
    """Return an attention of the given widths that takes its dropouts and bias from timm's ``old``."""
    heads, qk, v = widths.heads[index], widths.qk[index], widths.v[index]
    parts = {n: getattr(old, n) for n in ("q_norm", "k_norm", "attn_drop", "norm", "gate", "proj_drop")}
    bias, out_bias = old.qkv.bias is not None, old.proj.bias is not None
    proj = nn.Linear(heads * v, widths.embed, bias=out_bias)
    source = SimpleNamespace(num_heads=heads, head_dim=qk, scale=HEAD_WIDTH**-0.5, qkv=None, proj=proj, **parts)
    new = OpenAttention(source)
    new.v_dim = v
    for name, width in (("q", qk), ("k", qk), ("v", v)):
        setattr(new, name, nn.Linear(widths.embed, heads * width, bias=bias))
    return new


def build_vit(widths: Mapping[str, Any] | ViTWidths, *, distilled: bool = False, **kwargs: Any) -> nn.Module:
    """Return a timm vision transformer with the given widths, freshly initialised.

    Args:
        widths: ``ViTWidths`` or its JSON; sets the depth.
        distilled: With DeiT's distillation token and head.
        **kwargs: Further options of timm's ``VisionTransformer`` (``img_size``, ``num_classes``, ...).

    Raises:
        ModelError: Widths that do not fit together, or given twice.
    """
    widths = widths if isinstance(widths, ViTWidths) else ViTWidths.from_json(widths)
    twice = sorted({"embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_layer", "qk_norm"} & kwargs.keys())
    if twice:
        raise ModelError(f"model option {twice[0]!r}: the widths say it all; drop it or change widths")
    make = VisionTransformerDistilled if distilled else VisionTransformer
    model: Any = make(embed_dim=widths.embed, depth=widths.depth, num_heads=1, **kwargs)
    for i, block in enumerate(model.blocks):
        replace_module(model, f"blocks.{i}.attn", _attention(block.attn, widths, i))
        for name, shape in (("fc1", (widths.embed, widths.mlp[i])), ("fc2", (widths.mlp[i], widths.embed))):
            setattr(block.mlp, name, nn.Linear(*shape, bias=getattr(block.mlp, name).bias is not None))
    model.init_weights()
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {"input_size": (3, 224, 224), "num_classes": 1000, "pool_size": None, "crop_pct": 0.9,
            "fixed_input_size": True, "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj", "classifier": "head", **kwargs}  # fmt: skip


_TWO_HEADS = _cfg(classifier=("head", "head_dist"))
default_cfgs = generate_default_cfgs(
    {
        "revit_tiny_patch16_224": _cfg(),
        "revit_small_patch16_224": _cfg(),
        "hetero_vit_patch16_224": _cfg(),
        "revit_tiny_distilled_patch16_224": _TWO_HEADS,
        "revit_small_distilled_patch16_224": _TWO_HEADS,
        "hetero_vit_distilled_patch16_224": _TWO_HEADS,
    }
)


def _named(variant: str, widths: Mapping[str, Any] | ViTWidths, pretrained: bool, **kwargs: Any) -> nn.Module:
    make = partial(build_vit, widths, distilled="_distilled_" in variant)
    return build_model_with_cfg(make, variant, pretrained, **kwargs)


@register_model
def revit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ReViT of width 176."""
    return _named("revit_tiny_patch16_224", redistribute(176), pretrained, **kwargs)


@register_model
def revit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ReViT of width 384."""
    return _named("revit_small_patch16_224", redistribute(384), pretrained, **kwargs)


@register_model
def revit_tiny_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ReViT of width 176 with a distillation token (as released)."""
    return _named("revit_tiny_distilled_patch16_224", redistribute(176), pretrained, **kwargs)


@register_model
def revit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a ReViT of width 384 with a distillation token (as released)."""
    return _named("revit_small_distilled_patch16_224", redistribute(384), pretrained, **kwargs)


@register_model
def hetero_vit_patch16_224(
    pretrained: bool = False, *, widths: Mapping[str, Any] | ViTWidths, **kwargs: Any
) -> nn.Module:
    """Return a ViT of the given widths."""
    return _named("hetero_vit_patch16_224", widths, pretrained, **kwargs)


@register_model
def hetero_vit_distilled_patch16_224(
    pretrained: bool = False, *, widths: Mapping[str, Any] | ViTWidths, **kwargs: Any
) -> nn.Module:
    """Return a ViT of the given widths with a distillation token."""
    return _named("hetero_vit_distilled_patch16_224", widths, pretrained, **kwargs)
