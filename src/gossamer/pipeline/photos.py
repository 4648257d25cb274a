"""Which patches of real photographs were pruned and merged, as data for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.data.sources import ImageSource
from gossamer.data.transforms import eval_transform
from gossamer.models.preprocessing import Preprocessing
from gossamer.models.timm_adapter import token_view
from gossamer.ops.tokens import find_track
from gossamer.tasks.classification import predictor

__all__ = ["photo_maps", "source_grids"]

NUM_PHOTOS = 6


def source_grids(source: Tensor, num_prefix: int, grid: tuple[int, int]) -> list[list[int]]:
    """Return for one image the group of every patch [rows][columns], -1 where it was pruned.

    Args:
        source: Membership [M, N_0] of the tokens that are left.
        num_prefix: Leading non-patch tokens.
        grid: Patch rows and columns.
    """
    members = source[:, num_prefix:]
    group = members.argmax(0)
    group[members.sum(0) < 0.5] = -1
    return group.reshape(grid).tolist()


def photo_maps(
    model: nn.Module, dense: nn.Module, images: ImageSource | None, pre: Preprocessing, run_dir: Path
) -> list[dict[str, Any]]:
    """Return photographs with their patch groups after every block in which tokens changed.

    Writes the cropped photographs to ``run_dir/artefacts/photos``. A model that reduces no tokens
    gives an empty list.
    """
    track = find_track(model)
    if track is None or images is None:
        return []
    view = token_view(dense)
    folder = run_dir / "artefacts" / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    transform = eval_transform(pre)
    maps = []
    step = max(1, len(images) // NUM_PHOTOS)
    for index in range(0, len(images), step)[:NUM_PHOTOS]:
        sample = images[index]
        x = transform(sample.image).unsqueeze(0)
        before = int(predictor(dense)(x).argmax())
        track.trace = True
        after = int(predictor(model)(x).argmax())
        sources = [None if s is None else s[0] for s in track.source]
        track.trace = False
        track.clear()
        blocks, last = [], view.num_tokens
        for block, source in enumerate(sources[1:]):
            if source is not None and source.shape[0] != last:
                last = source.shape[0]
                blocks.append({"block": block, "grid": source_grids(source, view.num_prefix, view.grid)})
        name = f"{Path(sample.name).stem}.jpg"
        _picture(x[0], pre).save(folder / name, quality=88)
        classes = images.classes
        maps.append(
            {
                "name": sample.name,
                "label": classes[sample.label] if classes else str(sample.label),
                "dense": classes[before] if classes else str(before),
                "finished": classes[after] if classes else str(after),
                "image": name,
                "blocks": blocks,
            }
        )
    return maps


def _picture(x: Tensor, pre: Preprocessing) -> Any:
    """Return the normalised image [3, H, W] as a picture: exactly what the model saw."""
    from PIL import Image

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pre.mean, pre.std))
    pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
