"""Multi-head self-attention with its two products laid open.

Library attention modules hide the score and value products in a function call. Methods that
quantize these products, bias the keys or read the attention need them as modules, so models are
*opened*: the library's attention is replaced by one of the classes below, which adopts its
parameters under the same names (state dicts stay interchangeable) and computes the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError

__all__ = ["Attended", "MatMul", "OpenAttention", "OpenWindowAttention", "class_attention"]


class MatMul(nn.Module):
    """``a @ b`` as a module, so that it can be replaced (by a quantized product, for example)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the batched product of ``a`` [..., M, K] and ``b`` [..., K, N]."""
        return a @ b


class Attended(NamedTuple):
    """What ``OpenAttention.attend`` returns.

    Attributes:
        out: Output tokens [B, N, C].
        q: Queries [B, H, N, D], unscaled.
        k: Keys [B, H, N, D].
        attn: Attention [B, H, N, N], ``None`` where the fused kernel hid it.
    """

    out: Tensor
    q: Tensor
    k: Tensor
    attn: Tensor | None


def class_attention(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, rows: int = 1) -> Tensor:
    """Return the attention of the first ``rows`` queries [B, H, rows, N], recomputed in O(rows N D).

    Args:
        q: Queries [B, H, N, D].
        k: Keys [B, H, N, D].
        scale: Score scale.
        bias: Additive score bias broadcastable to [B, H, rows, N].
        rows: Number of leading queries.
    """
    scores = (q[:, :, :rows] * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1)


class OpenAttention(nn.Module):
    """Self-attention of a pre-norm ViT block with ``scores``, ``softmax`` and ``values`` as submodules.

    The three projections are one layer ``qkv``, or after ``split`` three layers ``q``, ``k`` and ``v``; only
    then may queries and values have different widths. The score scale is kept whatever the widths become.

    Args:
        source: A timm ``Attention`` (or an object with the same attributes); its submodules are
            adopted, not copied.

    Attributes:
        num_heads: Heads H.
        qk_dim: Width of a head's queries and keys.
        v_dim: Width of a head's values.
        scale: Factor of the scores.
        holders: How many methods need it open.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    qkv: nn.Module | None
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads: int = source.num_heads
        self.qk_dim: int = source.head_dim
        self.v_dim: int = source.head_dim
        self.scale: float = source.scale
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(self, name, getattr(source, name))
        self.scores = MatMul()
        self.softmax = nn.Softmax(-1)
        self.values = MatMul()
        self.holders = 1
        self._source = (source,)  # in a tuple: no submodule, or every parameter would be there twice

    def closed(self) -> nn.Module | None:
        """Return the module this one was made from, holding its present parts; ``None`` if they no longer fit it."""
        if self.qkv is None or self.qk_dim != self.v_dim or not self.fusable:
            return None
        source = self._source[0]
        source.num_heads, source.head_dim, source.scale = self.num_heads, self.qk_dim, self.scale
        source.attn_dim = self.attn_dim
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"):
            setattr(source, name, getattr(self, name))
        return source

    @property
    def attn_dim(self) -> int:
        """Width of all heads' values together."""
        return self.num_heads * self.v_dim

    def split(self) -> None:
        """Replace the fused projection by three layers that hold its rows (no-op if done before)."""
        fused = self.qkv
        if fused is None:
            return
        if not isinstance(fused, nn.Linear):
            raise ModelError(f"attention: qkv is {type(fused).__name__}; expected nn.Linear. Split the float model")
        biases = [None] * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        for name, weight, bias in zip("qkv", fused.weight.detach().chunk(3), biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=fused.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone(), requires_grad=fused.weight.requires_grad)
            setattr(self, name, layer.train(self.training))
        self.qkv = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys [B, H, N, D] (unnormalised) and values [B, H, N, Dv] of tokens ``x`` [B, N, C]."""
        b, n, _ = x.shape
        if self.qkv is not None:
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.qk_dim).permute(2, 0, 3, 1, 4)
            return tuple(qkv.unbind(0))  # type: ignore[return-value]
        parts = ((self.q, self.qk_dim), (self.k, self.qk_dim), (self.v, self.v_dim))
        q, k, v = (layer(x).reshape(b, n, self.num_heads, width).transpose(1, 2) for layer, width in parts)
        return q, k, v

    @property
    def fusable(self) -> bool:
        """Whether products and softmax are plain, so that the fused kernel computes the same."""
        plain = type(self.scores) is MatMul and type(self.values) is MatMul
        return plain and type(self.softmax) is nn.Softmax

    def attend(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        normalise: Callable[[Tensor], Tensor] | None = None,
        *,
        need_attn: bool = False,
    ) -> Attended:
        """Attend and return the parts.

        Args:
            x: Tokens [B, N, C].
            bias: Additive score bias, broadcastable to [B, H, N, N] (``log(size)`` of keys, a mask).
            normalise: Replaces the softmax over the last axis of the scores.
            need_attn: Ask for the attention matrix (the fused kernel is then not used).
        """
        b, n, _ = x.shape
        q, k, v = self.project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = None
        if self.fusable and normalise is None and not need_attn:
            drop = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        else:
            s = self.scores(q * self.scale, k.transpose(-2, -1))
            s = s if bias is None else s + bias
            attn = self.softmax(s) if normalise is None else normalise(s)
            out = self.values(self.attn_drop(attn), v)
        out = self.norm(out.transpose(1, 2).reshape(b, n, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return Attended(self.proj_drop(self.proj(out)), q, k, attn)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attended tokens [B, N, C]; the signature is that of timm's attention."""
        if is_causal:
            n = x.shape[1]
            future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            attn_mask = torch.zeros(n, n, device=x.device, dtype=x.dtype).masked_fill(future, float("-inf"))
        elif attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, float("-inf"))
        return self.attend(x, attn_mask).out


class OpenWindowAttention(nn.Module):
    """Swin's window attention (relative position bias) with ``scores``, ``softmax`` and ``values`` as submodules.

    Args:
        source: A timm Swin ``WindowAttention``; its parameters and submodules are adopted.
    """

    relative_position_index: Tensor
    qkv: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads: int = source.num_heads
        self.scale: float = source.scale
        self.window_area: int = source.window_area
        self.relative_position_bias_table: Tensor = source.relative_position_bias_table
        self.register_buffer("relative_position_index", source.relative_position_index, persistent=False)
        for name in ("qkv", "attn_drop", "proj", "proj_drop"):
            setattr(self, name, getattr(source, name))
        self.scores = MatMul()
        self.softmax = nn.Softmax(-1)
        self.values = MatMul()
        self.holders = 1
        self._source = (source,)

    def closed(self) -> nn.Module | None:
        """Return the module this one was made from, holding its present parts; ``None`` if they no longer fit it."""
        if not (type(self.scores) is MatMul and type(self.values) is MatMul and type(self.softmax) is nn.Softmax):
            return None
        source = self._source[0]
        source.num_heads, source.scale = self.num_heads, self.scale
        source.relative_position_bias_table = self.relative_position_bias_table
        for name in ("qkv", "attn_drop", "proj", "proj_drop"):
            setattr(source, name, getattr(self, name))
        return source

    def _position_bias(self) -> Tensor:
        area = self.window_area
        flat = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return flat.view(area, area, -1).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: Window tokens [windows * B, N, C].
            mask: 0 / -inf mask [windows, N, N] or ``None``.
        """
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        s = self.scores(q * self.scale, k.transpose(-2, -1)) + self._position_bias()
        if mask is not None:
            w = mask.shape[0]
            s = (s.view(-1, w, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.num_heads, n, n)
        attn = self.attn_drop(self.softmax(s))
        out = self.values(attn, v).transpose(1, 2).reshape(b, n, -1)
        return self.proj_drop(self.proj(out))
