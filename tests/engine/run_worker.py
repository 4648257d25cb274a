"""Run in a process of its own by the tests: ``kill`` (one process) and ``ranks`` (under torchrun)."""

import os
import sys
from pathlib import Path

import torch
from engine_toys import CASES, Data, make_loop, net
from safetensors.torch import save_file

from gossamer.engine.loop import RunOptions


def kill(folder: Path, case: str, at: int) -> None:
    """Run ``case``, resuming whatever is there; the process kills itself at draw ``at`` (0: never)."""
    data = Data(stop_at=at or None, number=9)
    loop = make_loop(case, folder, data, options=RunOptions(resume=True), ema=0.9, checkpoint_every=2)
    model = loop.run(net(dropout=0.2))
    save_file(model.state_dict(), folder.with_suffix(".safetensors"))
    print(data.drawn)


def ranks(folder: Path) -> None:
    """Run every case on this rank's share; write its final weights, and rank 0's losses."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for case in [*CASES, "norm", "dropout", "accumulate"]:
        losses: list[dict] = []
        options = RunOptions(on_row=losses.append)
        known = case if case in CASES else "plain"
        # a loader that knows its own rank draws differently in units of work: the ranks must follow the first
        data = Data(world=world, rank=rank if "calibrate" in case else None)
        kind = {"norm": case == "norm", "dropout": 0.5 if case == "dropout" else 0.0}
        settings = {"accumulate": 2 if case == "accumulate" else 1, "clip_grad": 1.0, "ema": 0.9}
        model = make_loop(known, None, data, options=options, **settings).run(net(**kind))
        save_file(model.state_dict(), folder / f"{case}.{world}.{rank}.safetensors")
        if rank == 0:
            trained = torch.tensor([v for row in losses for v in row.get("terms", {}).values()])
            save_file({"losses": trained}, folder / f"{case}.{world}.losses.safetensors")
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        ranks(Path(sys.argv[2]))
