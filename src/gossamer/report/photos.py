"""Which patches of real photographs a finished model prunes and merges, block by block."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from gossamer.data.images import BrokenImage, ImageSource
from gossamer.data.transforms import eval_transform
from gossamer.kits.token_reduction import source_maps
from gossamer.models.preprocessing import Preprocessing
from gossamer.ops.tokens import find_track
from gossamer.tasks.classification import logits_of

__all__ = ["photo_maps"]


class HasModel(Protocol):
    """A saved stage of a run."""

    def model(self) -> nn.Module:
        """Return the stage's model."""
        ...


def _grid(groups: Tensor, grid: tuple[int, int]) -> list[list[int]]:
    """Return the group ids [patches] of one picture as rows; a grid the model does not tell is taken as square."""
    rows, columns = grid
    side = round(len(groups) ** 0.5)
    if rows == 1 and side * side == len(groups):
        rows, columns = side, side
    return groups.reshape(rows, columns).tolist()


def _as_seen(x: Tensor, pre: Preprocessing) -> str:
    """Return the picture [C, H, W] the model sees, its normalisation undone, as a JPEG data URI."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pre.mean, pre.std))
    pixels = ((x * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    stream = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze(-1).numpy())
    picture.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _read(source: ImageSource, count: int) -> list[Any]:
    """Return up to ``count`` readable samples spread evenly over the source."""
    stride = max(1, len(source) // count)
    found = []
    for i in range(0, len(source), stride):
        try:
            found.append(source[i])
        except BrokenImage:  # named in the source's list of failures
            continue
        if len(found) == count:
            break
    return found


@torch.inference_mode()
def _answers(model: nn.Module, x: Tensor) -> list[int]:
    return logits_of(model(x)).argmax(-1).tolist()


def photo_maps(
    stages: Sequence[HasModel], source: ImageSource, pre: Preprocessing, *, count: int = 8
) -> list[dict[str, Any]]:
    """Return the ``photos`` entries of ``report.json`` for a run's last stage.

    Args:
        stages: Stages of the run, the dense one first, the finished one last.
        source: Photographs, for example the evaluation images.
        pre: Preprocessing of the model.
        count: Number of photographs.

    Returns:
        ``{name, label, dense, finished, image, blocks}`` a photograph; empty when the finished model
        reduces no tokens.
    """
    finished = stages[-1].model().eval() if stages else None
    if finished is None or find_track(finished) is None:
        return []
    samples = _read(source, count)
    if not samples:
        return []
    transform = eval_transform(pre)
    x = torch.stack([transform(s.image) for s in samples])
    maps = source_maps(finished, x)
    dense, now = _answers(stages[0].model().eval(), x), _answers(finished, x)
    names = source.classes or []

    def name(k: int) -> str:
        return names[k].replace("_", " ") if k < len(names) else f"class {k}"

    return [
        {
            "name": s.name,
            "label": name(s.label),
            "dense": name(dense[b]),
            "finished": name(now[b]),
            "image": _as_seen(x[b], pre),
            "blocks": [{"block": i, "grid": _grid(g[b], maps["grid"])} for i, g in enumerate(maps["groups"])],
        }
        for b, s in enumerate(samples)
    ]  # fmt: skip
