"""Runs in processes of their own: killed without warning, and two ranks under torchrun."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toys import CASES, Data, make_loop, net, same
from run_worker import ranks
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "run_worker.py"
SOURCE = Path(__file__).parents[2] / "src"


def environment():
    paths = [str(SOURCE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def ranks_environment():
    """Two ranks need two GPUs, or none."""
    return environment() | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def work(*args, check=True):
    command = [sys.executable, str(WORKER), *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("case", ["two_pass+duel+rates+average"])
def test_killed_run_resumes_bit_equal(case, tmp_path):
    data = Data()
    reference = make_loop(case, None, data, ema=0.9).run(net(dropout=0.2)).state_dict()
    at = random.SystemRandom().randint(2, data.drawn)
    print(f"killed at draw {at} of {data.drawn}")
    assert work("kill", tmp_path / "cut", case, at, check=False).returncode == -9
    work("kill", tmp_path / "cut", case, 0)
    assert same(load_file(tmp_path / "cut.safetensors"), reference)


def test_killed_from_outside_resumes_bit_equal(tmp_path):
    reference = make_loop("grow", None, ema=0.9).run(net(dropout=0.2)).state_dict()
    command = [sys.executable, str(WORKER), "kill", str(tmp_path / "cut"), "grow", "0"]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "checkpoints").is_dir() and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.001)
    time.sleep(random.SystemRandom().random() * 0.05)
    victim.kill()
    if victim.wait() == 0:  # it was faster than the signal; nothing is left to resume
        return
    work("kill", tmp_path / "cut", "grow", 0)
    assert same(load_file(tmp_path / "cut.safetensors"), reference)


def test_processes_find_each_other_without_being_told_the_device(tmp_path):
    """On a machine without accelerators Accelerate by itself would start two runs of one process each."""
    script = tmp_path / "places.py"
    script.write_text(
        "from pathlib import Path\n"
        "from gossamer.engine.distributed import is_main, rank, world\n"
        f"Path({str(tmp_path)!r}, f'{{rank()}}.place').write_text(f'{{world()}} {{is_main()}}')\n"
    )
    settings = {k: v for k, v in environment().items() if k != "ACCELERATE_USE_CPU"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=True)
    # A file each: what two processes print to one pipe may interleave.
    assert {f.stem: f.read_text() for f in tmp_path.glob("*.place")} == {"0": "2 True", "1": "2 False"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every case on one process and on two; the weights of each rank and the losses."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks(folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run(
        [*launch, "ranks", str(folder)], env=ranks_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", [*CASES, "norm", "dropout", "accumulate"])
def test_two_ranks_end_bit_equal(case, both):
    assert same(load_file(both / f"{case}.2.0.safetensors"), load_file(both / f"{case}.2.1.safetensors"))


@pytest.mark.parametrize("case", [c for c in CASES if "two_pass" not in c and "calibrate" not in c])
def test_two_ranks_have_the_losses_of_one(case, both):
    """Left out: a two-pass step ascends on each rank's share, calibration looks at one rank's batch."""
    one, two = (load_file(both / f"{case}.{n}.losses.safetensors")["losses"] for n in (1, 2))
    assert torch.allclose(one, two, rtol=0, atol=1e-5), (one - two).abs().max()
