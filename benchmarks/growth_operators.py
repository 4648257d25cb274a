"""How much each growth operator disturbs a network: loss right after growth minus loss right before.

    python benchmarks/growth_operators.py recipe.yaml data.train=npz:... --seeds 3

The recipe's training runs under AutoProg's manual schedule. At every growth point the network is grown by every
operator in turn and its loss on eight training batches of the new resolution (evaluation mode) is compared with that of
the network as it was, on the same batches; then the training goes on as the recipe says.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.core.method import Edit
from gossamer.core.schedule import Loader, Phase, Step
from gossamer.core.stack import Stack
from gossamer.engine.loop import Loop
from gossamer.kits.growth.depth import OPERATORS, grow_model
from gossamer.methods.autoprog import AutoProg
from gossamer.methods.autoprog.maths import split_depth
from gossamer.pipeline.setup import set_up
from gossamer.recipe import Recipe

BATCHES = 8


@dataclass
class Watched(AutoProg):
    """AutoProg that tries every operator before it grows by its own."""

    seen: list[dict[str, float]] = field(default_factory=list)
    draw: Loader | None = None

    def enter(self, model: nn.Module, phase: Phase) -> Edit | None:
        """Try the operators, then decide as ever."""
        first, edit = not self._now, super().enter(model, phase)
        if edit is not None and not first and self.draw is not None:
            self._size = edit["sizes"][-1]
            steps = [Step("growth_operators", "look", i, BATCHES) for i in range(BATCHES)]
            batches = [self.draw(s) for s in steps]
            self._size = None
            before = _loss(model, batches)
            self.seen.append({k: _loss(self._tried(model, edit, k), batches) - before for k in OPERATORS})
        return edit

    def _tried(self, model: nn.Module, edit: Edit, operator: str) -> nn.Module:
        """Return a copy of ``model``, grown by ``operator``."""
        deeper, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
        counts, average = split_depth(edit["depth"], self._full), self._copies[0].average
        grow_model(deeper, self._full.chains, counts, operator, average=average, generator=draw)
        return deeper


@torch.no_grad()
def _loss(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    model.eval()
    return statistics.fmean(float(F.cross_entropy(model(b["image"]), b["target"])) for b in batches)


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[list[dict[str, float]]] = []
    for seed in range(args.seeds):
        recipe = Recipe.from_yaml(args.recipe, [*args.overrides, f"seed={seed}"])
        options = next(dict(o) for entry in recipe.methods for o in entry.values() if "resolution_step" in o)
        method = Watched(**{**options, "search": False, "growth": "mogrow"})
        setup = set_up(recipe, methods=[method])
        method.draw = method.loader("train", setup.loaders["train"])
        loop = Loop(Stack([method]), setup.task, setup.loaders, setup.plan, settings=recipe.train, seed=seed)
        loop.run(setup.model)
        found.append(method.seen)
        print(f"seed {seed}: {json.dumps(method.seen)}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for operator in found[0][0]:
        means = [statistics.fmean(point[operator] for point in seed) for seed in found]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        print(f"{operator:16s} {statistics.fmean(means):+.4f} (sd over seeds {spread:.4f})")


if __name__ == "__main__":
    main()
