"""What growth asks of a model: blocks that may come and go, inputs of any size; for timm's ViT and VOLO."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from timm.layers import DropPath
from timm.layers.format import Format
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO, Outlooker, Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gossamer.core.errors import ModelError
from gossamer.models.timm_adapter import token_view
from gossamer.ops.positions import resize_grid

__all__ = ["Chain", "Layout", "branch_outputs", "drop_rate", "growth_layout", "resizable", "set_drop_rate"]


@dataclass(frozen=True)
class Chain:
    """Blocks that are alike and follow one another, over one or more containers.

    Attributes:
        containers: Module paths of the ``nn.Sequential``s or ``nn.ModuleList``s, in order.
        full: Blocks that each of them holds in the full model.
        dropped: Whether its blocks have stochastic depth.
    """

    containers: tuple[str, ...]
    full: tuple[int, ...]
    dropped: bool = False

    @property
    def depth(self) -> int:
        """Blocks of the full chain."""
        return sum(self.full)


@dataclass(frozen=True)
class Layout:
    """A full model as growth sees it.

    Attributes:
        chains: Its chains in order of the data flow.
        size: Side of its square input in pixels.
        stride: Pixels between neighbouring tokens at their coarsest: inputs are multiples of it.
        drop_path: Stochastic-depth rate of its last block.
        resizes: Whether it takes inputs of other sizes by itself.
    """

    chains: tuple[Chain, ...]
    size: int
    stride: int
    drop_path: float
    resizes: bool = False

    @property
    def depth(self) -> int:
        """Blocks of the full model."""
        return sum(c.depth for c in self.chains)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """Rebuild from ``to_json``."""
        chains = tuple(Chain(tuple(c["containers"]), tuple(c["full"]), c["dropped"]) for c in data["chains"])
        return cls(**{**data, "chains": chains})


def drop_rate(block: nn.Module) -> float:
    """Return the stochastic-depth rate of a block."""
    return max((m.drop_prob for m in block.children() if isinstance(m, DropPath)), default=0.0)


def set_drop_rate(block: nn.Module, rate: float) -> None:
    """Give a block the stochastic-depth rate ``rate`` in [0, 1)."""
    for name in ("drop_path1", "drop_path2"):
        if hasattr(block, name):
            setattr(block, name, DropPath(rate) if rate > 0 else nn.Identity())


def branch_outputs(block: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs a block adds to its residual stream (attention's and MLP's last matrix).

    Raises:
        ModelError: A branch holds no matrix.
    """
    found = []
    for branch in ("attn", "mlp"):
        matrices = [m for m in block.get_submodule(branch).modules() if _is_matrix(m)]
        if not matrices:
            raise ModelError(f"{type(block).__name__}.{branch}: holds no linear layer; expected timm's blocks")
        found.append(matrices[-1])
    return found


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


class _ResizingVOLO(VOLO):
    """VOLO whose position embedding follows the token grid."""

    def forward_tokens(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.network):
            if index == 2 and self.pos_embed is not None:  # after the outlookers and the downsampling, as in timm
                x = self.pos_drop(x + resize_grid(self.pos_embed, (x.shape[1], x.shape[2])))
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x.flatten(1, 2)


def growth_layout(model: nn.Module) -> Layout:
    """Return the layout of a full model.

    Raises:
        ModelError: Neither a plain timm vision transformer nor timm's VOLO, or its input is not square.
    """
    if isinstance(model, VOLO):
        return _volo_layout(model)
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"{type(model).__name__}: growth needs timm's VisionTransformer (ViT, DeiT) or VOLO")
    own = bool(model.dynamic_img_size)
    if own:
        blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    else:
        blocks = [b.name for b in token_view(model).blocks]
    sides, patch = tuple(model.patch_embed.img_size), tuple(model.patch_embed.patch_size)
    if sides[0] != sides[1] or patch[0] != patch[1]:
        raise ModelError(f"{type(model).__name__}: input {sides}, patches {patch}; growth needs square ones")
    if model.pos_embed is None:
        raise ModelError(f"{type(model).__name__}: has no learned position embedding; growth in resolution needs one")
    rate = max(drop_rate(model.get_submodule(b)) for b in blocks)
    chain = Chain((blocks[0].rpartition(".")[0],), (len(blocks),), rate > 0)
    return Layout((chain,), int(sides[0]), int(patch[0]), rate, own)


def _volo_layout(model: VOLO) -> Layout:
    kinds = (Outlooker, Transformer)
    lists = [(f"network.{i}", s) for i, s in enumerate(model.network) if isinstance(s, nn.Sequential) and len(s)]
    chains, rates = [], [0.0]
    for kind in kinds:
        mine = [(name, s) for name, s in lists if all(type(b) is kind for b in s)]
        widths = {b.get_parameter("norm1.weight").numel() for _, s in mine for b in s}
        if not mine or len(widths) != 1:
            raise ModelError(f"VOLO: {kind.__name__} blocks of widths {sorted(widths)}; growth needs one width")
        rate = max(drop_rate(b) for _, s in mine for b in s)
        rates.append(rate)
        chains.append(Chain(tuple(n for n, _ in mine), tuple(len(s) for _, s in mine), rate > 0))
    convs = [m.stride[0] for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)]
    stride = math.prod(convs) * model.pooling_scale
    return Layout(tuple(chains), int(model.pos_embed.shape[1]) * stride, stride, max(rates))


def resizable(model: nn.Module, layout: Layout, on: bool) -> nn.Module:
    """Return the model with the ability to take inputs of other sizes than its own, or (``on`` false) without.

    Parameters and their names stay; the position embedding is resized to the grid at hand in every
    forward pass. Without it the model is the ordinary one of its library.
    """
    if not isinstance(model, VisionTransformer):
        wanted = _ResizingVOLO if on else VOLO
        if type(model) is wanted:
            return model
        same = wanted.__new__(wanted)  # the same parts in a model of the other class; the old one is left behind
        same.__dict__.update(model.__dict__)
        return same
    if not layout.resizes:
        embed = model.patch_embed
        vars(model)["dynamic_img_size"] = on  # final only to type checkers
        embed.strict_img_size, embed.flatten = not on, not on
        embed.output_fmt = Format.NHWC if on else Format.NCHW
    return model
