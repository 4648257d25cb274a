"""FQSR: the interval's mathematics, the release's numbers, what is quantized, what ships."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError, StateError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.ledger import cost
from gossamer.export.exporting import export
from gossamer.kits.dataflow import Dataflow
from gossamer.methods.fqsr import FQSR
from gossamer.methods.fqsr.example import pairs, tiny_edsr
from gossamer.methods.fqsr.layers import FQAdd, FQConv2d, Interval, intervals
from gossamer.methods.fqsr.placement import find_placement
from gossamer.models.build import load_model
from gossamer.ops.grids import InputGrid
from gossamer.ops.int8 import Int8Conv2d
from gossamer.ops.sums import Add, RoundedAdd
from gossamer.runtimes import get

ROOM = resources.files("gossamer.methods.fqsr")
FIGURES = {f["name"]: f for f in tomllib.loads(ROOM.joinpath("figures.toml").read_text(encoding="utf-8"))["figure"]}


def _rounding(bits: int, half: bool = False, clip: float = 1.0, **options: Any) -> Interval:
    new = Interval(bits, half, **options)
    new.observing = False
    new.clip.data.fill_(clip)
    return new


def _ready(model: nn.Module, method: FQSR) -> tuple[nn.Module, Stack]:
    """Return a model whose intervals round, and its stack."""
    stack = Stack([method])
    model = stack.prepare(model)
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, phase)
        for i in range(phase.steps if phase.work else 0):
            phase.work(model.eval(), {"train": pairs}, Step(phase.name, "work", i, phase.steps))
        model = stack.leave(model, phase)
    return model, stack


# -- the interval ----------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels(bits: int) -> None:
    x = torch.linspace(-1.5, 1.5, 20001)
    full, n = _rounding(bits)(x), 2**bits - 1
    assert len(full.unique()) == 2**bits and full.max() == 1 and full.min() == -1
    assert not (full == 0).any() and _rounding(bits)(torch.zeros(1)).item() == pytest.approx(1 / n, rel=1e-4)
    half = _rounding(bits, half=True)(x)
    assert len(half.unique()) == 2**bits and half.min() == 0 and half.max() == 1
    zero = _rounding(bits, zero=True)(x)
    assert (zero == 0).any() and len(zero.unique()) == 2**bits
    inside = x[(x.abs() * n % 2 - 1).abs() < 0.9]
    torch.testing.assert_close(_rounding(bits)(-inside), -_rounding(bits)(inside))


@pytest.mark.parametrize("half", [False, True])
def test_symmetries(half: bool) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    q = _rounding(4, half, 0.7)
    y = q(x)
    torch.testing.assert_close(_rounding(4, half, -0.7)(x), y)
    torch.testing.assert_close(_rounding(4, half, 2.1)(3 * x), 3 * y)
    torch.testing.assert_close(q(y), y)
    torch.testing.assert_close(_rounding(16, half, 0.7)(x), x.clamp(0 if half else -0.7, 0.7), atol=3e-5, rtol=0)


def test_gradients() -> None:
    x = torch.tensor([-2.0, -0.6, -0.05, 0.3, 0.69, 0.71, 3.0], requires_grad=True)
    q = _rounding(3, clip=0.7)
    y = q(x)
    y.backward(w := torch.arange(1.0, 8.0))
    inside = x.detach().abs() <= 0.7
    assert torch.equal(x.grad, w * inside)
    each = torch.where(inside, (y - x).detach() / 0.7, x.detach().sign())
    torch.testing.assert_close(q.clip.grad, (w * each).sum().reshape(1))
    up, down = (_rounding(3, clip=0.7 + e)(x.detach()) for e in (1e-3, -1e-3))
    torch.testing.assert_close(((up - down) / 2e-3)[~inside], x.detach().sign()[~inside], atol=1e-3, rtol=0)


def test_calibration_loss_pulls_outliers_in_and_moves_the_interval_alone() -> None:
    x = torch.tensor([-2.0, -0.6, 0.1, 0.5, 1.5], requires_grad=True)
    q = _rounding(4, clip=1.0).train()
    q(x)
    (loss,) = q.noted
    loss.backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.2, 0, 0, 0, 0.2]))
    assert q.clip.grad.abs() > 0
    q.noted.clear()
    q.eval()(x)
    assert not q.noted
    silent = _rounding(4, loss="").train()
    silent(x)
    assert not silent.noted


def test_scaled_gradients_are_those_of_lsq() -> None:
    x = torch.linspace(-2, 2, 50)
    plain, scaled = _rounding(4, zero=True), _rounding(4, zero=True, scaled=True)
    for q in (plain, scaled):
        q(x).square().sum().backward()
    torch.testing.assert_close(scaled.clip.grad, plain.clip.grad / (50 * 7) ** 0.5)


def test_warm_up_returns_the_input_and_averages_its_magnitude() -> None:
    q, tops = Interval(4, False, warmup=3), []
    for k in range(5):
        x = torch.randn(30, generator=torch.Generator().manual_seed(k))
        tops.append(float(x.abs().max()))
        assert torch.equal(q(x), x)
    assert float(q.clip.detach()) == pytest.approx(sum(tops[:3]) / 3)
    lsq = Interval(4, False, warmup=1, start="lsq", zero=True)
    lsq(x)
    assert float(lsq.clip.detach()) == pytest.approx(7 * 2 * float(x.abs().mean()) / 7**0.5, rel=1e-5)


def test_intervals_may_be_trained_in_units_of_their_start() -> None:
    x, ends = torch.linspace(-300, 300, 101), []
    for relative in (0.0, 1.0, 10.0):
        q = Interval(8, False, warmup=1)
        q(x)
        q.activate(relative)
        optimiser = torch.optim.Adam([q.clip], 1e-3)
        y = q(x)
        y.square().sum().backward()
        optimiser.step()
        ends.append((float(q.step()) * q.codes, y.detach()))
    for _, levels in ends[1:]:
        torch.testing.assert_close(ends[0][1], levels)
    assert ends[0][0] == pytest.approx(300 - 1e-3, abs=1e-3)
    assert [end for end, _ in ends[1:]] == pytest.approx([300 * (1 - 1e-3), 300 * (1 - 1e-2)], rel=1e-5)


# -- the release's numbers ---------------------------------------------------------------------------
def _oracle() -> dict[str, Any]:
    return json.loads(ROOM.joinpath("oracle.json").read_text(encoding="utf-8"))


def _input(shape: list[int], seed: int) -> Tensor:
    """Return the same numbers everywhere: a linear congruence, no library's generator."""
    count, state, values = torch.Size(shape).numel(), seed, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        values.append(state / 2**30 - 1)
    return torch.tensor(values).reshape(shape)


@pytest.mark.parametrize("case", _oracle()["quantizers"], ids=lambda c: f"{c['tag']}{c['bits']}{'h' * c['half']}")
def test_interval_equals_the_release(case: dict[str, Any]) -> None:
    x = _input(case["shape"], case["seed"]).mul(case["gain"]).requires_grad_()
    q = _rounding(case["bits"], case["half"], case["clip"]).train()
    y = q(x)
    limit = FIGURES["quantizer_against_release"]["tolerance"]
    torch.testing.assert_close(y.flatten().detach(), torch.tensor(case["out"]), atol=limit, rtol=limit)
    assert q.noted[0].item() == pytest.approx(case["loss"] / case["alpha"], rel=1e-5)
    (y.square().sum() + case["alpha"] * q.noted[0]).backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(case["grad"]), atol=1e-5, rtol=1e-5)
    assert float(q.clip.grad) == pytest.approx(case["clip_grad"], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("case", _oracle()["layers"], ids=lambda c: c["name"])
def test_layers_equal_the_release(case: dict[str, Any]) -> None:
    limit = FIGURES["layer_against_release"]["tolerance"]
    x = _input(case["shape"], case["seed"])
    if case["name"] == "sum":
        got = FQAdd(_rounding(case["bits"], clip=case["clip"]))(x, _input(case["shape"], case["seed"] + 1))
    else:
        conv = nn.Conv2d(2, 3, 3, padding=1)
        conv.weight.data.copy_(0.3 * _input([3, 2, 3, 3], 5))
        conv.bias.data.copy_(_input([3], 6))
        w, a, o = (_rounding(case["bits"], half, clip) for half, clip in zip(
            (False, case["half"], False), case["clips"], strict=True))  # fmt: skip
        got = FQConv2d(conv, w, a, o, pad_first=case["pad_first"])(x)
    torch.testing.assert_close(got.flatten().detach(), torch.tensor(case["out"]), atol=limit, rtol=limit)


# -- what is quantized -------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "scale"), [("edsr_baseline_x2", 2), ("edsr_baseline_x4", 4), ("srresnet_x2", 2)])
def test_every_convolution_and_every_addition_is_quantized(name: str, scale: int) -> None:
    model, _ = _ready(load_model(name, depth=2, width=4, img_size=8), FQSR(warmup=1))
    first = "head.0"
    last = "tail.1" if name.startswith("edsr") else "tail"
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | FQConv2d)}
    assert all(isinstance(m, FQConv2d) for m in convs.values())
    assert [n for n, m in convs.items() if m.input_interval is None] == [first]
    assert [n for n, m in convs.items() if m.output_interval is None] == [last]
    flow = Dataflow(model)  # the walk that gives the method its name
    sums = [n for n in flow._graph.nodes if flow._is_sum(n)]
    assert len(sums) == 3
    for node in sums:
        for operand in node.args:
            assert isinstance(model.get_submodule(str(operand.target)), Interval), (node, operand)
    assert not any(isinstance(m, Add) for m in model.modules())


def test_figures_of_the_architecture() -> None:
    for scale in (2, 4):
        model = load_model(f"edsr_baseline_x{scale}", img_size=8)
        place = find_placement(model)
        macs = {n: a["macs"] / 64 for n, a in place.convs.items()}
        assert sum(macs.values()) == FIGURES[f"edsr_x{scale}_macs_per_pixel"]["value"]
        tail = sum(v for n, v in macs.items() if n.startswith("tail"))
        assert tail == FIGURES[f"edsr_x{scale}_tail_macs_per_pixel"]["value"]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bit_operations(bits: int) -> None:
    model, stack = _ready(tiny_edsr(), FQSR(weight_bits=bits, input_bits=bits, output_bits=8, warmup=1))
    macs = {n: a["macs"] for n, a in stack.methods[0]._placement.convs.items()}
    expected = sum(m * bits * (8 if n == "head.0" else bits) for n, m in macs.items())
    assert cost(model, saved=False).bops == expected
    assert stack.describe(model)["FQSR"]["facts"]["BOPs per image"] == expected


def test_ranges_follow_the_dataflow() -> None:
    place = find_placement(load_model("edsr_baseline_x2", depth=2, width=4, img_size=8))
    assert {n: a["input"] for n, a in place.convs.items()} == {
        "head.0": "float", "body.0.body.0": "full", "body.0.body.2": "half", "body.1.body.0": "full",
        "body.1.body.2": "half", "body.2": "full", "tail.0.0": "full", "tail.1": "full",
    }  # fmt: skip
    sloped = find_placement(load_model("edsr_baseline_x2", depth=1, width=4, img_size=8, act="prelu"))
    assert not [n for n, a in sloped.convs.items() if a["input"] == "half"]
    assert any("PReLU" in why for why in sloped.islands.values())
    assert "body.0.body.0" in place.spare and "body.0.body.0" not in sloped.spare
    assert ["body.0.add", "body.0.body.0"] in place.ties and ["body.1.add", "body.1.body.0"] in place.ties


def test_switches_of_the_release() -> None:
    model = load_model("edsr_baseline_x2", depth=2, width=4, img_size=8)
    assert find_placement(model, skips="body").adds == ["body.0.add", "body.1.add"]
    assert find_placement(model, skips="none").adds == []
    normed = load_model("srresnet_x2", depth=1, width=4, img_size=8)
    assert len(find_placement(normed).norms) == 3 and not find_placement(normed, fold=False).norms
    assert sum("batch norm" in w for w in find_placement(normed, fold=False).islands.values()) == 3


@pytest.mark.parametrize("pad", ["before", "after"])
def test_borders(pad: str) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    layer = FQConv2d(conv, _rounding(2), _rounding(2, clip=3.0), None, pad == "before")
    y = layer(torch.full((1, 1, 5, 5), 3.0))
    border = 1.0 if pad == "before" else 0.0  # c / n, or nothing
    assert y[0, 0, 0, 0].item() == pytest.approx(4 * 3 + 5 * border) and y[0, 0, 2, 2].item() == pytest.approx(27)


# -- training ----------------------------------------------------------------------------------------
def test_observation_leaves_the_network_alone() -> None:
    model, plain = tiny_edsr(), tiny_edsr().eval()
    stack = Stack([FQSR(warmup=2)])
    model = stack.prepare(model)
    start = stack.phases(Plan([Phase("fit", 3)]))[0]
    model = stack.enter(model, start).eval()
    x = pairs(Step("x", "x", 0, 1))["image"]
    assert start.steps == 2 and torch.equal(model(x), plain(x))
    assert all(i.clip.item() > 0 and i.calls.item() >= 1 for i in intervals(model))


def test_loss_is_the_sum_over_all_intervals() -> None:
    model, stack = _ready(tiny_edsr(), FQSR(weight_bits=3, input_bits=3, output_bits=3, warmup=1))
    batch = pairs(Step("fit", "main", 0, 1))
    out = model.train()(batch["image"])
    noted = [v for i in intervals(model) for v in i.noted]
    assert len(noted) == 6 + 5 + 5 + 2 * 2  # weights, inputs, outputs, both operands of two additions
    terms = stack.methods[0].loss(model, batch, out, Step("fit", "main", 0, 1))
    torch.testing.assert_close(terms["fqsr.calibration"], 0.3 * torch.stack(noted).sum())
    assert not any(i.noted for i in intervals(model))


@torch.no_grad()
def test_initialisation_is_worth_most() -> None:
    """A naive start at 1 clips everything of range 255; observation keeps the network close to the float one."""
    x = pairs(Step("x", "x", 0, 1), 4)["image"]
    expected, errors = tiny_edsr().eval()(x), {}
    for start in ("max", "lsq", "one"):
        model, _ = _ready(tiny_edsr(), FQSR(start=start, warmup=4, grid="midtread" if start == "lsq" else "midrise"))
        errors[start] = float((model.eval()(x) - expected).abs().mean())
    assert errors["max"] < 0.1 * errors["one"] and errors["lsq"] < errors["one"]


# -- what ships ------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad", ["before", "after"])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("grid", ["midrise", "midtread"])
def test_the_finished_model_computes_what_was_trained(bits: int, grid: str, pad: str) -> None:
    method = FQSR(weight_bits=bits, input_bits=bits, output_bits=bits, grid=grid, pad=pad, warmup=2)
    model, stack = _ready(tiny_edsr(width=8), method)
    x = pairs(Step("x", "x", 0, 1), 2)["image"]
    with torch.no_grad():
        expected = model.eval()(x)
        model = stack.finish(model).eval()
        got = model(x)
    layers = [m for m in model.modules() if isinstance(m, Int8Conv2d)]
    assert len(layers) == 6 and sum(isinstance(m, RoundedAdd) for m in model.modules()) == 2
    # a value half-way between two levels may fall to either side
    assert float((got - expected).abs().mean()) < 2e-3 * float(expected.std())


def test_grids_of_deployment_round_every_value_once() -> None:
    model, stack = _ready(tiny_edsr(), FQSR(warmup=2, deployment="midtread"))
    block = model.body[0]
    assert block.body[0].output_interval is None and block.body[2].input_interval is not None
    assert block.body[0].input_interval is block.add.interval
    assert all(i.zero for i in intervals(model))
    x = pairs(Step("x", "x", 0, 1), 2)["image"]
    with torch.no_grad():
        expected = model.eval()(x)
        got = stack.finish(model).eval()(x)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    kinds = {m.kind for m in model.modules() if isinstance(m, InputGrid)}
    assert kinds == {"signed", "unsigned"}


class _Own(nn.Module):
    """A network of a user's own, that says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.tail = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 12)))
        self.add, self.shuffle = Add(), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return self.shuffle(self.tail(self.add(y, self.body(y))))


def test_a_network_of_ones_own() -> None:
    model, stack = _ready(_Own(), FQSR(warmup=2))
    x = pairs(Step("x", "x", 0, 1))["image"]
    with torch.no_grad():
        expected = model.eval()(x)
        got = stack.finish(model).eval()(x)
    assert float((got - expected).abs().mean()) < 2e-3 * float(expected.std())
    said = stack.describe(model)["FQSR"]
    assert "BOPs per image" not in said["facts"] and said["tables"][0]["rows"][0]["MACs"] is None


def test_norms_that_stay_ship_as_they_were_trained() -> None:
    model = load_model("srresnet_x2", depth=1, width=8, img_size=8)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    model, stack = _ready(model, FQSR(warmup=2, norms="keep"))
    x = pairs(Step("x", "x", 0, 1))["image"]
    with torch.no_grad():
        expected = model.eval()(x)
        model = stack.finish(model).eval()
        got = model(x)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
    assert float((got - expected).abs().mean()) < 2e-3 * float(expected.std())


def test_wide_layers_stay_simulated() -> None:
    model, stack = _ready(tiny_edsr(), FQSR(weight_bits=10, input_bits=10, output_bits=10, warmup=1))
    model = stack.finish(model)
    assert sum(isinstance(m, FQConv2d) for m in model.modules()) == 6


# -- refusals --------------------------------------------------------------------------------------
class _Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return F.relu(self.b(y)) + y


def test_refusals() -> None:
    for options, text in (
        ({"weight_bits": 1}, "weight_bits: bits=1"), ({"grid": "mid"}, "allowed are midrise, midtread"),
        ({"warmup": 0}, "warmup=0"), ({"alpha": -1.0}, "alpha=-1"), ({"relative": -1.0}, "relative=-1"),
        ({"skips": "some"}, "allowed are all, body, none"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=text):
            Stack([FQSR(**options)]).prepare(tiny_edsr())
    with pytest.raises(ModelError, match="additions of _Loose are no modules .*ops.sums.Add"):
        Stack([FQSR()]).prepare(_Loose())
    Stack([FQSR(skips="none")]).prepare(_Loose())
    with pytest.raises(ModelError, match="has 0 convolutions"):
        Stack([FQSR()]).prepare(nn.Linear(3, 3))
    padded = _Loose()
    padded.a = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ModelError, match="convolution 'a' has padding"):
        Stack([FQSR(skips="none")]).prepare(padded)
    model, _ = _ready(tiny_edsr(), FQSR(warmup=1))
    with pytest.raises(ModelError, match="quantized already"):
        Stack([FQSR()]).prepare(model)
    with pytest.raises(StateError, match="run the phase 'fqsr.start' before finish"):
        FQSR().finish(tiny_edsr())


@pytest.mark.parametrize(("format", "runtime"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_products_and_sums_run_in_integers(format: str, runtime: str, act: str, tmp_path: Path) -> None:
    """All but the declared islands: the first convolution reads the picture, the last returns it (float in one)."""
    model, stack = _ready(tiny_edsr(depth=2, width=16, act=act, img_size=16), FQSR(warmup=2, deployment="midtread"))
    model = stack.finish(model).eval()
    x = pairs(Step("x", "x", 0, 1), 1, 16)["image"]
    artefact = export(model, tmp_path, format=format, batch=1, example=x)
    session = get(runtime).load(artefact.graph, precision="f32", profile=True)
    session.run(x.numpy())
    ops = session.profile()
    products = [op for op in ops if op.product]
    floating = [op for op in products if op.precision != "i8"]
    assert len(products) == 8 and len(floating) <= (2 if runtime == "onnxruntime" else 1)
    if runtime == "onnxruntime":
        assert sum(op.type == "QLinearAdd" for op in ops) == 3
        assert not any(op.type == "PRelu" for op in ops)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_exact_form_exports(runtime: str, tmp_path: Path) -> None:
    format = {"onnxruntime": "onnx", "openvino": "openvino"}[runtime]
    for bits in (4, 8):
        method = FQSR(weight_bits=bits, input_bits=bits, output_bits=bits, warmup=2)
        model, stack = _ready(tiny_edsr(width=8), method)
        x = pairs(Step("x", "x", 0, 1), 1)["image"]
        artefact = export(stack.finish(model).eval(), tmp_path / str(bits), format=format, batch=1, example=x)
        assert artefact.parity["relative"] <= artefact.parity["tolerance"]
