"""A quantized super-resolution generator is trained against a float judge, in one stack."""

from __future__ import annotations

import torch

from gossamer.core.registry import build
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.engine.loop import Loop
from gossamer.methods.srgan.example import pairs, tiny_generator
from gossamer.ops.int8 import Int8Conv2d
from gossamer.tasks.super_resolution import SuperResolution


def test_a_quantized_generator_is_trained_against_the_judge() -> None:
    bits = {"weight_bits": 6, "input_bits": 6, "output_bits": 6}
    stack = Stack([build("srgan", {"width": 4}), build("fqsr", {"warmup": 1, **bits})])
    loop = Loop(stack, SuperResolution(scale=2), {"train": pairs}, Plan([Phase("fit", 2)]))
    model = loop.train(tiny_generator())
    assert [t.name for p in loop.plan for t in p.turns if p.work is None] == ["judge", "main"]
    finished = loop.finish(model)
    assert sum(isinstance(m, Int8Conv2d) for m in finished.modules()) == 6
    assert torch.isfinite(finished(pairs(Step("x", "x", 0, 1))["image"])).all()
