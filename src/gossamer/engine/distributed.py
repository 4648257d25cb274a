"""Ranks and devices through Accelerate: launch with ``torchrun`` or ``accelerate launch``.

Accelerate supplies the device, the process group, the DDP wrapper and the collectives. Mixed
precision stays with the loop (one recipe, one meaning, whatever the launcher's settings say).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from torch import Tensor, nn

from gossamer.core.errors import RecipeError, RunError
from gossamer.engine.pack import pack, unpack

__all__ = [
    "average_gradients",
    "broadcast_data",
    "broadcast_tensors",
    "check_equal",
    "is_main",
    "make_accelerator",
    "rank",
    "state_tensors",
    "world",
]

_BUCKET = 2**23
"""Elements of one collective: bounds the memory of the flat copy."""
_KINDS = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


def _cpu() -> bool:
    """Return whether to train on CPUs; Accelerate has to be told, or it takes every process for a run of its own."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return asked or not torch.accelerator.is_available()


def rank() -> int:
    """Return this process's rank, 0 when alone."""
    return PartialState(cpu=_cpu()).process_index


def world() -> int:
    """Return the number of processes."""
    return PartialState(cpu=_cpu()).num_processes


def is_main() -> bool:
    """Return whether this process writes files and shows bars."""
    return PartialState(cpu=_cpu()).is_main_process


def make_accelerator() -> Accelerator:
    """Return the accelerator of this process.

    Raises:
        RecipeError: The launcher asks for something the loop does not run under.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):  # on CPUs Accelerate ignores it
        raise RecipeError(
            "accelerate: FSDP is asked for; allowed are a single process and DDP. Methods read and write whole weights "
            "(masks, quantizers, averages), which sharded ones are not. Use a configuration without FSDP, or torchrun"
        )
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > gpus > 0:  # with its CPUs asked for too: Accelerate's barriers name a GPU by the rank
        raise RecipeError(
            f"torchrun: {local} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}; start one a GPU, or hide the "
            f"GPUs to train on CPUs: CUDA_VISIBLE_DEVICES='' torchrun ..."
        )
    # The DDP-wrapped module returns the loss terms themselves, so the search for unused parameters is exact.
    handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        accelerator = Accelerator(mixed_precision="no", cpu=_cpu(), kwargs_handlers=[handler])
    except ValueError as err:
        raise RecipeError(
            f"accelerate: {err}; gossamer needs mixed_precision='no' from the launcher, state train.precision instead"
        ) from err
    if accelerator.distributed_type not in _KINDS:
        raise RecipeError(
            f"accelerate: distributed type {accelerator.distributed_type.value}; allowed are single process and DDP. "
            f"Launch with torchrun, or with an accelerate configuration without sharding"
        )
    return accelerator


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        for t in same:
            bucket.append(t)
            if sum(b.numel() for b in bucket) >= _BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    parts = flat.split([t.numel() for t in like])
    return ((t, part.view_as(t)) for t, part in zip(like, parts, strict=True))


@torch.no_grad()
def average_gradients(accelerator: Accelerator, params: Sequence[nn.Parameter]) -> None:
    """Replace every ``.grad`` by its mean over ranks; missing ones count as zero.

    A parameter that has no gradient on any rank keeps none, as in one process.
    """
    if accelerator.num_processes == 1:
        return
    has = torch.tensor([float(p.grad is not None) for p in params], device=accelerator.device)
    counts = accelerator.reduce(has, "sum").tolist()
    used = [p for p, count in zip(params, counts, strict=True) if count]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used if p.grad is not None]):
        mean = accelerator.reduce(torch.cat([g.reshape(-1) for g in bucket]), "mean")
        for grad, part in _unflatten(mean, bucket):
            grad.copy_(part)


def state_tensors(modules: Iterable[nn.Module], *, buffers_only: bool = False) -> list[Tensor]:
    """Return parameters and buffers of modules, each once; with ``buffers_only`` the floating-point buffers."""
    found: dict[int, Tensor] = {}
    for module in modules:
        tensors = (
            [b for b in module.buffers() if b.is_floating_point()]
            if buffers_only
            else [
                *module.parameters(),
                *module.buffers(),
            ]
        )
        found.update({id(t): t for t in tensors})
    return list(found.values())


@torch.no_grad()
def broadcast_tensors(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Overwrite the tensors by those of rank 0."""
    if accelerator.num_processes == 1:
        return
    for bucket in _buckets(tensors):
        flat = broadcast(torch.cat([t.detach().reshape(-1) for t in bucket]), from_process=0)
        for tensor, part in _unflatten(flat, bucket):
            tensor.copy_(part)


def broadcast_data(value: Any, device: torch.device) -> Any:
    """Return rank 0's ``value`` (nested plain data and tensors, as in a checkpoint) on every rank."""
    box = [pack(value)]
    broadcast_object_list(box, from_process=0)
    tree, tensors = box[0]
    return unpack(tree, tensors, device)


def check_equal(accelerator: Accelerator, what: str, value: object) -> None:
    """Raise unless ``value`` (plain data) equals that of rank 0.

    Raises:
        RunError: The ranks went apart.
    """
    if accelerator.num_processes == 1:
        return
    box = [value]
    broadcast_object_list(box, from_process=0)
    theirs = box[0]
    if theirs != value:
        raise RunError(
            f"{what} differ between rank 0 and rank {accelerator.process_index}: {theirs!r} and {value!r}; a method "
            f"decides from data of one rank or draws from a generator that is not step.generator()"
        )
