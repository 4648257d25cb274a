"""Quantization-aware training of a whole model: which layers, at which widths, from which clips, to which end.

Everything is driven by plain JSON, so that edits can be replayed: ``find_layers`` looks at a model once,
``wrap_layers`` puts the layers of ``ops.liq`` in place, ``finish_layers`` gives them their deployed form.
"""

from gossamer.kits.qat.finish import final_forms, finish_layers, foldable_norms, open_sums, sum_grids
from gossamer.kits.qat.layout import SHORTCUTS, QatLayer, QatLayout, Widths, find_layers, layer_rows
from gossamer.kits.qat.training import (
    CLIP_STARTS,
    decay_clips,
    first_batch,
    init_clips,
    qat_layers,
    set_widths,
    unwrap_layers,
    wrap_layers,
)

__all__ = [
    "CLIP_STARTS",
    "SHORTCUTS",
    "QatLayer",
    "QatLayout",
    "Widths",
    "decay_clips",
    "final_forms",
    "find_layers",
    "finish_layers",
    "first_batch",
    "foldable_norms",
    "init_clips",
    "layer_rows",
    "open_sums",
    "qat_layers",
    "set_widths",
    "sum_grids",
    "unwrap_layers",
    "wrap_layers",
]
