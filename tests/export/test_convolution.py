"""Convolutional networks in 8 bits and fewer: exact graphs, and integer kernels from end to end in both runtimes."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

import gossamer as gs
from gossamer.export.exporting import export
from gossamer.export.layout import lay_out
from gossamer.export.onnx import trace, write
from gossamer.kits.calibration import calibrate
from gossamer.kits.conv_layout import round_outputs
from gossamer.ops.grids import LayerGrids
from gossamer.ops.int8 import int8_layer
from gossamer.runtimes import get
from gossamer.runtimes.session import int8_share

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def small_resnet():
    torch.manual_seed(0)
    return ResNet(Bottleneck, (1, 1, 1, 2), channels=(16, 16, 24, 24), num_classes=10).eval()


def profiled(runtime, graph, images):
    """Return (output, profile) of a graph file."""
    session = get(runtime).load(graph, precision="f32", profile=True, threads=1)
    out = [session.run(images.numpy()) for _ in range(2)][-1]
    return out, session.profile()


@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("build", [small_resnet, lambda: timm.create_model("mobilenetv2_035", num_classes=10).eval()])
def test_products_and_sums_of_a_network_run_in_integers(build, format, tmp_path):
    model = calibrate(gs.PTQMinMax(per_channel=True), build(), IMAGES)
    artefact = export(model, tmp_path, format=format, batch=2, example=IMAGES)
    assert artefact.parity["relative"] <= artefact.parity["tolerance"]
    _, profile = profiled(RUNTIMES[format], artefact.graph, IMAGES)
    assert int8_share(profile, by="count") == 1.0
    kinds = Counter(op.type for op in profile)
    assert not kinds & Counter(("Conv", "Add", "Relu", "BatchNormalization", "FusedConv"))
    if format == "onnx":
        assert kinds["QLinearAdd"] > 3


class Branches(nn.Module):
    """Convolutions without an activation, whose concatenated outputs another one reads: codes of both signs."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.right, self.join, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1), nn.Linear(16, 10)

    def forward(self, x):
        """Return logits [B, 10] of images [B, 3, 32, 32]."""
        x = self.stem(x)
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.join(both if self.scale is None else self.scale * both).relu().mean((2, 3)))


@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_concatenated_codes_of_both_signs_keep_their_values(scale, format, tmp_path):
    """OpenVINO computes another convolution where signed codes are concatenated."""
    model = calibrate(gs.PTQMinMax(per_channel=True), Branches(scale).eval(), IMAGES)
    artefact = export(model, tmp_path, format=format, batch=2, example=IMAGES)
    assert artefact.parity["relative"] < 0.01
    _, profile = profiled(RUNTIMES[format], artefact.graph, IMAGES)
    assert int8_share(profile, by="count") == 1.0


def small_net(grids, kernel=3, groups=1):
    """Return three layers on ``grids``, their sum rounded to 8 bits; inputs in [0, 1]."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, kernel, padding=kernel // 2, groups=groups),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    levels = 2**grids.weight_bits - 1
    for at, top in ((0, 1.0), (2, 0.8), (6, 0.6)):
        weight = net[at].weight.detach().abs().max() / (levels if grids.weight_grid == "odd" else levels / 2)
        net[at] = int8_layer(net[at], grids, weight, top / (2**grids.input_bits - 1))
    return round_outputs(net, {"3": {"bits": 8, "kind": "unsigned", "step": 0.6 / 255}})


@pytest.mark.parametrize("runtime", RUNTIMES.values())
@pytest.mark.parametrize(
    "grids",
    [LayerGrids(b, b, "odd", "unsigned") for b in (1, 2, 4, 8)]
    + [LayerGrids(8, 4, "odd", "signed"), LayerGrids(4, 4, "symmetric", "asymmetric"), LayerGrids(3, 8)],
    ids=lambda g: f"{g.weight_grid}{g.weight_bits}-{g.input_grid}{g.input_bits}",
)
def test_every_grid_runs_in_integers_and_stays_exact(grids, runtime, tmp_path):
    model = small_net(grids)
    with torch.no_grad():
        want = model(IMAGES).numpy()
    graph = trace(model, IMAGES)
    lay_out(graph, runtime)
    write(graph, tmp_path / "model.onnx")
    got, profile = profiled(runtime, tmp_path / "model.onnx", IMAGES)
    assert int8_share(profile, by="count") == 1.0
    assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)


def test_odd_8_bit_weights_take_one_integer_convolution_in_onnxruntime(tmp_path):
    graph = trace(small_net(LayerGrids(8, 8, "odd", "unsigned")), IMAGES)
    lay_out(graph, "onnxruntime")
    assert Counter(n.op_type for n in graph.graph)["Conv"] == 2
    depthwise = trace(small_net(LayerGrids(8, 8, "odd", "unsigned"), groups=16), IMAGES)
    lay_out(depthwise, "onnxruntime")
    assert Counter(n.op_type for n in depthwise.graph)["Conv"] == 1 + 2  # groups keep their sums apart


def test_bounds_move_into_codes_only_where_saturation_does_not_do(tmp_path):
    class Bounded(nn.Module):
        def __init__(self, bound, step, kind):
            super().__init__()
            self.act, self.layer = bound, int8_layer(nn.Conv2d(3, 4, 1), LayerGrids(input_grid=kind), 0.01, step)

        def forward(self, x):
            return self.layer(self.act(x - 0.5)).mean((2, 3))

    for bound, step, kind, clips in (
        (nn.ReLU(), 0.01, "unsigned", 0),
        (nn.ReLU(), 0.01, "signed", 1),
        (nn.Hardtanh(0, 0.3), 0.001, "unsigned", 0),
        (nn.Hardtanh(0, 0.3), 0.002, "unsigned", 1),
    ):
        model = Bounded(bound, step, kind)
        graph = trace(model, IMAGES)
        lay_out(graph, "onnxruntime")
        kinds = Counter(n.op_type for n in graph.graph)
        assert (kinds["Relu"], kinds["Clip"]) == (0, clips)
        session = profiled("onnxruntime", _written(graph, tmp_path), IMAGES)
        np.testing.assert_allclose(session[0], model(IMAGES).detach().numpy(), atol=1e-4)


def _written(graph, folder):
    write(graph, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_a_float_input_stay_int8_in_the_file(bits):
    layer = int8_layer(nn.Conv2d(3, 64, 7), LayerGrids(bits, 32, "odd", "float"), 0.1 / 2**bits).eval()
    graph = trace(layer, IMAGES)
    wide = [v for v in graph.graph.initializers.values() if v.const_value.size == layer.weight.numel()]
    assert [v.dtype for v in wide] == [ir.DataType.INT8]


def test_narrow_weights_fill_int8(tmp_path):
    graph = trace(small_net(LayerGrids(2, 4, "odd", "unsigned")), IMAGES)
    lay_out(graph, "onnxruntime")
    tops = [
        int(np.abs(v.const_value.numpy().astype(int)).max())
        for v in graph.graph.initializers.values()
        if v.dtype == ir.DataType.INT8 and v.const_value.size > 64
    ]
    assert tops and min(tops) == 126


class Shuffled(nn.Module):
    """A convolution, a pixel shuffle and a PReLU, read by two layers on the same grid whose results are added."""

    def __init__(self, bits):
        super().__init__()
        torch.manual_seed(0)
        grids = LayerGrids(8, bits)
        self.first = int8_layer(nn.Conv2d(3, 16, 3, padding=1), LayerGrids(8, 8, input_grid="unsigned"), 0.003, 1 / 255)
        self.middle = int8_layer(nn.Conv2d(4, 16, 3, padding=1), grids, 0.003, 1.0 / 2**bits)
        self.left, self.right = (int8_layer(nn.Conv2d(4, 4, 3, padding=1), grids, 0.003, 1.0 / 2**bits) for _ in "ab")
        self.shuffle, self.act = nn.PixelShuffle(2), nn.PReLU()

    def forward(self, x):
        y = self.shuffle(self.middle(self.act(self.shuffle(self.first(x)))))
        return self.left(y) + self.right(y)


@pytest.mark.parametrize("runtime", RUNTIMES.values())
@pytest.mark.parametrize("bits", [4, 8])
def test_shared_values_are_rounded_once_and_before_they_are_shuffled(bits, runtime, tmp_path):
    model = Shuffled(bits).eval()
    with torch.no_grad():
        want = model(IMAGES).numpy()
    graph = trace(model, IMAGES)
    lay_out(graph, runtime)
    nodes = list(graph.graph)
    kinds = Counter(n.op_type for n in nodes)
    assert kinds["QuantizeLinear"] == 3  # the tracer merges what two readers round alike
    assert kinds["PRelu"] == (0 if runtime == "onnxruntime" else 1)
    last = [n for n in nodes if n.op_type == "DepthToSpace"][-1]
    assert last.inputs[0].producer().op_type == ("QuantizeLinear" if bits == 8 else "Clip")
    write(graph, tmp_path / "model.onnx")
    got = get(runtime).load(tmp_path / "model.onnx", precision="f32", threads=1).run(IMAGES.numpy())
    allowed = 5e-3 if bits == 8 else 2e-2  # a value on a border may fall to the next code, and codes of 4 bits are far
    assert np.linalg.norm(got - want) < allowed * np.linalg.norm(want)
