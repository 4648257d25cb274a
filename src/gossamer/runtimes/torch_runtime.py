"""torch itself, eager, on the CPU: the plain baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.errors import ModelError, StateError
from gossamer.ops.modes import evaluating
from gossamer.runtimes.session import OpClock, OpTime, Runtime, Session

__all__ = ["Torch", "TorchSession"]

_INT8_PRODUCTS = ("aten::_int_mm", "quantized::linear", "quantized::conv", "onednn::qlinear", "onednn::qconv")
_PRODUCTS = (
    *_INT8_PRODUCTS,
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_convolution",
    "aten::thnn_conv2d",
    "aten::_slow_conv2d_forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "mkldnn::_linear_pointwise",
)


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchSession(Session):
    """A module run eagerly in evaluation mode; its training mode and the thread count are restored."""

    runtime = "torch"

    def __init__(self, model: nn.Module, precision: str, threads: int, clock: OpClock | None) -> None:
        self.where = type(model).__name__
        self.precision, self.threads = precision, threads
        self._model = model
        self._clock = clock

    def _run(self, x: np.ndarray) -> np.ndarray:
        with ExitStack() as stack:
            stack.enter_context(_pinned(self.threads))
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"))
            if self._clock is None:
                out = self._model(torch.from_numpy(x))
            else:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
                    out = self._model(torch.from_numpy(x))
                self._clock.add(self._op_time(event) for event in prof.key_averages())
        first = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(first, torch.Tensor):
            raise ModelError(f"torch {self.where}: returned a {type(first).__name__}; a tensor was expected")
        return first.float().numpy()

    def _op_time(self, event: Any) -> OpTime:
        name = event.key
        product = name.startswith(_PRODUCTS)
        precision = "i8" if name.startswith(_INT8_PRODUCTS) else self.precision if product else ""
        return OpTime(name, name, name, precision, event.self_cpu_time_total / 1e3, product)

    def profile(self) -> list[OpTime]:
        """See ``Session.profile``; one entry per kind of operator, own time without its callees'."""
        if self._clock is None:
            raise StateError(f"torch {self.where}: not loaded for profiling; load it with profile=True")
        return self._clock.mean()


class Torch(Runtime):
    """torch eager: float32, or bfloat16 by autocast where that is native."""

    name = "torch"
    package = "torch"

    def _load(
        self, source: Any, precision: str | None, threads: int, profile: bool, batch: int | None = None
    ) -> TorchSession:
        if not isinstance(source, nn.Module):
            raise ModelError(f"torch: got a {type(source).__name__}; it loads modules. Build or load the model first")
        return TorchSession(source, precision or "f32", threads, OpClock() if profile else None)
