"""What feeds what in convolutional networks, folded norms, and sums that are rounded where they are made."""

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import gossamer as gs
from gossamer.core.errors import ModelError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.kits.calibration import calibrate
from gossamer.kits.conv_layout import find_conv_layout, round_outputs
from gossamer.kits.dataflow import Dataflow
from gossamer.kits.folding import fold_norms
from gossamer.models.source import create, source_of
from gossamer.models.store import load, save
from gossamer.ops.grids import InputGrid, LayerGrids
from gossamer.ops.int8 import int8_layer


def trained_like(model):
    """Give the batch norms statistics, and gains of either sign, as if trained."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.running_var.shape
            module.running_mean.copy_(torch.randn(size, generator=draw) * 0.1)
            module.running_var.copy_(torch.rand(size, generator=draw) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.randn(size, generator=draw).abs() + 0.5)
    return model.eval()


def small_resnet():
    torch.manual_seed(0)
    return trained_like(ResNet(BasicBlock, (1, 2, 1, 1), channels=(16, 24, 32, 32), num_classes=10))


class PreActivated(nn.Module):
    """Norm before convolution: the first norm reads a sum that others read too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv1(self.act1(self.norm1(x)))
        x = x + self.conv2(self.act2(self.norm2(y)))
        return self.fc(self.pool(x).flatten(1))


@pytest.mark.parametrize(
    "build", [small_resnet, lambda: trained_like(timm.create_model("mobilenetv2_035", num_classes=10))]
)
def test_all_norms_fold_and_nothing_changes(build):
    model, x = build(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        fold_norms(model, Dataflow(model).norms)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)


def test_a_norm_that_others_overtake_stays():
    model, x = trained_like(PreActivated()), torch.randn(2, 3, 8, 8)
    assert Dataflow(model).norms == [["conv1", "norm2"]]
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fold_norms(model, [["conv1", "norm2"]])(x), want, rtol=1e-4, atol=1e-5)


def test_norms_fold_into_deployed_layers():
    model, x = trained_like(PreActivated()), torch.rand(2, 3, 8, 8)
    source = model.conv1
    model.conv1 = int8_layer(source, LayerGrids(4, 8, "odd", "unsigned", 8), 0.02, 0.01, bias=True)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fold_norms(model, [["conv1", "norm2"]])(x), want, rtol=1e-4, atol=1e-5)
    model = trained_like(PreActivated())
    model.conv1 = int8_layer(source, LayerGrids(), 0.02, 0.01)
    with pytest.raises(ModelError, match="bias=True and num_scales=8"):
        fold_norms(model, [["conv1", "norm2"]])


def test_layout_names_sums_and_signs():
    layout = find_conv_layout(small_resnet())
    assert "conv1" in layout.units and "conv1" not in layout.unsigned and "layer1.0.conv1" in layout.unsigned
    assert layout.sums["layer1.0.bn2"] == "signed" and layout.sums["layer2.0.act2"] == "unsigned"
    assert "layer1.0.act1" not in layout.sums  # its only reader rounds it
    assert layout.heads == ("fc",)


def test_rounding_outputs_is_saved_with_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        plain = model(x)
        round_outputs(model, {"1": {"bits": 8, "kind": "unsigned", "step": 0.01}})
        grid = InputGrid(8, "unsigned")
        grid.fill("here", 0.01)
        assert torch.equal(model(x), grid(plain))
    assert "1.output_grid.scale" in model.state_dict()
    with pytest.raises(ModelError, match="no such module"):
        round_outputs(model, {"7": {"bits": 8, "kind": "signed"}})


def test_a_quantized_network_is_close():
    model, x = small_resnet(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        done = calibrate(gs.PTQMinMax(per_channel=True), model, x)
        assert float((done(x) - want).norm() / want.norm()) < 0.1
    assert not any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in done.modules())
    assert isinstance(done.layer1[0].bn2.output_grid, InputGrid)


def test_a_quantized_network_loads_without_images(tmp_path):
    stack, x = gs.Stack([gs.PTQMinMax()]), torch.randn(2, 3, 32, 32)
    model = trained_like(create("mobilenetv2_035", {}, 10))
    source, model = source_of(model), stack.prepare(model)
    for phase in stack.phases(Plan([Phase("fit", 0)])):
        model = stack.enter(model, phase)
        if phase.work is not None:
            loaders = {"calibration": lambda step: {"image": x[: 0 if step.index else 2]}}
            phase.work(model, loaders, Step(phase.name, "work", 0, 1))
        model = stack.leave(model, phase)
    model = stack.finish(model)
    again = load(save(model, tmp_path / "m", stack=stack, source=source))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_models_that_cannot_be_traced_or_hold_no_convolution():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Branching: its dataflow cannot be traced"):
        Dataflow(Branching())
    with pytest.raises(ModelError, match="holds no convolution"):
        find_conv_layout(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="fold the model it was found in"):
        fold_norms(nn.Sequential(nn.Linear(3, 3)), [["0", "1"]])
