"""Check that two ranks end bit-equal: ``torchrun --nproc-per-node 2 -m gossamer.conformance.ranks ROOM...``.

Every rank sees images of its own; prints one line a room and exits 1 if any room's ranks differ.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn

from gossamer.conformance.running import run
from gossamer.core.registry import methods
from gossamer.engine.distributed import make_accelerator, world

__all__ = ["fingerprint", "main"]


def fingerprint(model: nn.Module) -> str:
    """Return a hash of every tensor of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(rooms: Sequence[str]) -> int:
    """Run each room's example on all ranks; returns the exit code."""
    torch.set_num_threads(1)
    if world() < 2:
        raise SystemExit("one process compares with nobody; start this under torchrun --nproc-per-node 2")
    failed = 0
    for room in rooms:
        package = methods()[room].package if room in methods() else room
        outcome = run(import_module(f"{package}.example").example())
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, fingerprint(outcome.model))
        equal = len(set(found)) == 1
        failed += not equal
        if dist.get_rank() == 0:
            print(f"{room}: {len(found)} ranks {'bit-equal' if equal else 'DIFFER'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    make_accelerator()  # joins the processes; Accelerate's own default finds no peers on a machine without a GPU
    sys.exit(main(sys.argv[1:]))
