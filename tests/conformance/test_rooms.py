"""Every registered room keeps every rule. There is no list of exceptions."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from itertools import combinations

import pytest

from gossamer.conformance import CHECKS, ROOM_CHECKS, check_pair, fits
from gossamer.core.method import STAGES
from gossamer.core.registry import methods
from gossamer.kits.example import MethodExample

ROOMS = sorted(methods())


def example(room: str) -> MethodExample:
    return import_module(f"{methods()[room].package}.example").example()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("room", ROOMS)
def test_method(room: str, check: str) -> None:
    CHECKS[check](example(room))


@pytest.mark.parametrize("check", ROOM_CHECKS)
@pytest.mark.parametrize("room", ROOMS)
def test_room(room: str, check: str) -> None:
    ROOM_CHECKS[check](room)


def _pairs() -> list[tuple[str, str]]:
    """Return one pair of rooms for every pair of stages: the first two that can work on one model."""
    order = {room: STAGES.index(methods()[room].stage) for room in ROOMS}
    found: dict[frozenset[int], tuple[str, str]] = {}
    for a, b in combinations(sorted(ROOMS, key=order.__getitem__), 2):
        stages = frozenset((order[a], order[b]))
        if len(stages) == 2 and stages not in found and fits(example(a), example(b)):
            found[stages] = (a, b)
    return list(found.values())


@pytest.mark.parametrize(("first", "second"), _pairs())
def test_pair_of_stages(first: str, second: str) -> None:
    check_pair(example(first), example(second))


def test_two_ranks_end_bit_equal() -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gossamer.conformance.ranks",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, *ROOMS], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("bit-equal") == len(ROOMS)
