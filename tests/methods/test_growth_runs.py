"""AutoProg through the engine: networks that grow while they train."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.models.volo import VOLO
from torch import Tensor, nn

from gossamer.core.schedule import Phase, Step
from gossamer.core.stack import Stack
from gossamer.data.images import ImageSource
from gossamer.data.loading import StepLoader
from gossamer.data.transforms import train_transform
from gossamer.engine.loop import Loop
from gossamer.engine.options import RunOptions
from gossamer.kits.example import noise, tiny_vit
from gossamer.kits.growth.depth import interpolation, new_blocks
from gossamer.methods.autoprog import AutoProg
from gossamer.models.growing import growth_layout
from gossamer.models.preprocessing import preprocessing
from gossamer.recipe import TrainSettings
from gossamer.tasks.classification import Classification

SEARCH = {"search_ratio": 0.5, "records": 2, "batches": 2, "cost": "macs", "resolution_step": 8, "stages": 3}
MANUAL = {"search": False, "resolution_step": 8}


def volo(outlookers: int, transformers: int) -> nn.Module:
    torch.manual_seed(0)
    size = {"embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2], "stem_hidden_dim": 8}
    return VOLO([outlookers, transformers, 0, 0], num_classes=10, img_size=64, **size).eval()


def trained(method: AutoProg, model: nn.Module, steps: int = 12, *others, **settings) -> tuple[Loop, nn.Module, list]:
    rows: list = []
    given = TrainSettings(**{"lr": 1e-3, "schedule": "constant", **settings})
    loader = {"train": noise if not isinstance(model, VOLO) else large}
    options = RunOptions(on_row=rows.append)
    plan = [Phase("fit", steps)]
    loop = Loop(Stack([method, *others]), Classification(), loader, plan, settings=given, options=options)
    return loop, loop.run(model), rows


def large(step: Step) -> dict:
    batch = noise(step, 2)
    return {**batch, "image": torch.nn.functional.interpolate(batch["image"], (64, 64))}


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def edits(loop: Loop) -> list[dict]:
    return [e for _, e in loop.stack.edits if "kind" in e]


@pytest.mark.parametrize("make", [lambda: tiny_vit(depth=6), lambda: volo(2, 4)])
@pytest.mark.parametrize("options", [{**MANUAL, "stages": 3}, SEARCH])
def test_networks_grow_to_the_ordinary_full_model(make, options):
    step = 16 if isinstance(make(), VOLO) else 8
    plain, (loop, model, rows) = make(), trained(AutoProg(**{**options, "resolution_step": step}), make())
    assert type(model) is type(plain) and list(model.state_dict()) == list(plain.state_dict())
    stages = [(e["depth"], e["sizes"][-1]) for e in edits(loop) if e["kind"] == "stage"]
    size = growth_layout(plain).size
    assert stages[-1] == (6, size)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(stages, stages[1:], strict=False))
    assert sum("task" in r.get("terms", {}) for r in rows) == 12
    assert not loop.stack.lasting_edits() and growth_layout(model).depth == 6
    table = loop.stack.describe(model)["AutoProg"]["tables"][0]["rows"]
    assert [tuple(row[::-1][:2]) for row in table] == stages


def test_first_stage_is_physically_small_and_its_momentum_follows():
    seen = {}

    class Look(AutoProg):
        def after_step(self, model, step):
            super().after_step(model, step)
            shapes = [len(model.blocks), model.dynamic_img_size, len(self._copies)]
            seen.setdefault(step.phase, shapes)

    trained(Look(**MANUAL, stages=3), tiny_vit(depth=6))
    assert seen == {"fit.stage0": [3, True, 1], "fit.stage1": [5, True, 1], "fit.stage2": [6, False, 0]}


def grown(method: AutoProg) -> tuple[nn.Module, nn.Module]:
    """Return the network before and after its first growth, the weights having moved from their averages."""
    model = tiny_vit(depth=4)
    model = method.apply(model, method.prepare(model))
    phase = Phase("fit.stage0", 1)
    model = method.apply(model, method.enter(model, phase))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    method.after_step(model, Step("fit.stage0", "main", 0, 1))
    before = copy.deepcopy(model)
    model = method.apply(model, method.enter(model, Phase("fit.stage1", 1)))
    return before, model


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum_growth(momentum):
    """m = 0 is interpolation, m = 1 the initial network; blocks that are there keep the online weights."""
    options = {**MANUAL, "stages": 2, "momentum": momentum, "momentum_warmup": False}
    before, after = grown(AutoProg(**options))
    for new, source in enumerate(interpolation(2, 4)):
        is_new = new in new_blocks(2, 4)
        for ours, theirs in zip(after.blocks[new].parameters(), before.blocks[source].parameters(), strict=True):
            expected = theirs - momentum if is_new else theirs  # the weights had moved by 1
            assert torch.allclose(ours, expected, atol=1e-6)


def test_supernet_holds_the_network_it_grew_from():
    """Its smallest sub-network is the one before, and what is extracted is what was evaluated."""
    method = AutoProg(**SEARCH)
    model = tiny_vit(depth=4)
    model = method.apply(model, method.prepare(model))
    model = method.apply(model, method.enter(model, Phase("fit.super0.0", 1)))
    images = torch.randn(2, 3, 24, 24)
    assert len(model.blocks) == 4 and method._now["depths"] == [2, 3, 4] and method._now["sizes"] == [16, 24, 32]
    elastic = method._elastic()
    with elastic.running(model, [3]):
        inside = logits(model, images)
    losses = {"0": [[3.0 - 0.1 * i, 3.1 - 0.1 * i] for i in range(9)]}
    losses["0"][4] = [1.0, 1.1]  # (24, 3)
    method._losses, method._costs = losses, [1.0 + i for i in range(9)]
    model = method.apply(model, method.enter(model, Phase("fit.stage0", 1)))
    assert len(model.blocks) == 3 and torch.allclose(logits(model, images), inside, atol=1e-6)
    before = logits(model, images)
    model = method.apply(model, method.enter(model, Phase("fit.super1.0", 1)))
    assert method._now["depths"] == [3, 4] and method._now["sizes"] == [24, 32] and len(model.blocks) == 4
    with method._elastic().running(model, [3]):
        assert torch.allclose(logits(model, images), before, atol=1e-6)


def test_every_subnetwork_is_drawn_and_idle_blocks_get_no_gradient():
    drawn, idle = set(), 0

    class Look(AutoProg):
        def before_step(self, model, step):
            nonlocal idle
            if "super0" in step.phase:
                missing = [i for i, b in enumerate(model.blocks) if b.mlp.fc1.weight.grad is None]
                drawn.add(4 - len(missing))
                idle += bool(missing)

    trained(Look(**{**SEARCH, "search_ratio": 0.9, "records": 1}), tiny_vit(depth=4), steps=60)
    assert drawn == {2, 3, 4} and idle > 0


def test_search_stops_where_nothing_is_left_to_search():
    """A search that reached the full network early trains on, step for step."""
    options = {**SEARCH, "dims": ["resolution"], "start_scale": 1.0}
    loop, _, rows = trained(AutoProg(**options), tiny_vit(depth=4))
    assert not [r for r in rows if "size" in r.get("terms", {})]
    assert sum("task" in r.get("terms", {}) for r in rows) == 12
    assert {(e["depth"], e["sizes"][-1]) for e in edits(loop)} == {(4, 32)}


def test_first_stage_can_do_without_a_search():
    loop, _, rows = trained(AutoProg(**SEARCH, search_first=False), tiny_vit(depth=4))
    first, second = edits(loop)[:2]
    assert (first["kind"], first["depth"], first["sizes"]) == ("stage", 2, [16]) and second["kind"] == "super"
    assert {r["phase"].split(".")[1] for r in rows if "size" in r.get("terms", {})} == {"score1"}
    assert sum("task" in r.get("terms", {}) for r in rows) == 12


def test_depths_share_the_pictures_they_are_scored_on():
    method = AutoProg(**SEARCH)
    model = tiny_vit(depth=4)
    model = method.apply(model, method.prepare(model))
    model = method.apply(model, method.enter(model, Phase("fit.super0.0", 1)))
    draw, size = method.loader("train", noise), method._now["sizes"][0]
    method._score(0, model, {"train": draw}, Step("fit.score0.0", "work", 0, 3))
    with torch.no_grad(), method._copies[0].applied(model), method._sized(size):
        batches = [draw(Step("autoprog.score", "work", i, 2)) for i in range(2)]
        for depth, row in zip(method._now["depths"], method._losses["0"], strict=True):
            with method._network(model, depth)():
                alone = [torch.nn.functional.cross_entropy(model.train()(b["image"]), b["target"]) for b in batches]
            assert row == pytest.approx([float(v) for v in alone], abs=1e-6)
    assert batches[0]["image"].shape[-1] == size and len({tuple(r) for r in method._losses["0"]}) == 3


def test_scoring_leaves_weights_statistics_and_averages_alone():
    method = AutoProg(**{**SEARCH, "resolution_step": 16, "cost": "time", "timing_steps": 1})
    model = volo(2, 4)
    model = method.apply(model, method.prepare(model))
    model = method.apply(model, method.enter(model, Phase("fit.super0.0", 1)))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    average = {k: v.clone() for k, v in method._copies[0].average.items()}
    draw = method.loader("train", large)
    for index in range(len(method._now["sizes"])):
        terms = method._score(0, model, {"train": draw}, Step("fit.score0.0", "work", index, 3))
        for depth in method._now["depths"]:
            assert terms[f"time.{depth}"] > 0 and math.isfinite(terms[f"loss.{depth}"])
    assert len(method._costs) == len(method._candidates())
    assert method._scored(0) and not method._scored(1)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in method._copies[0].average.items())
    assert all(p.grad is None for p in model.parameters())


def test_regularisation_grows():
    method = AutoProg(**MANUAL)
    assert [method.level(k)["magnitude"] for k in range(4)] == pytest.approx([0.5, 2 / 3, 5 / 6, 1.0])
    assert [method.level(k)["erase"] for k in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1.0])
    assert AutoProg(regularisation={"drop_path": -1.0}).level(1)["drop_path"] == 0.0
    model = tiny_vit(depth=4, drop_path_rate=0.3)
    rates = []

    class Look(AutoProg):
        def after_step(self, model, step):
            super().after_step(model, step)
            rates.append([getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks])

    trained(Look(**MANUAL, stages=3), model, steps=3)
    assert rates[0] == [0, 0] and rates[1] == pytest.approx([0, 0.075, 0.15])
    assert rates[2] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_pictures_are_made_at_the_size_of_the_stage():
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 48, 48, 3), dtype=torch.uint8).numpy()
    source = ImageSource([str(i) for i in range(8)], list(range(8)), lambda i: Image.fromarray(pixels[i]))
    model = tiny_vit(depth=4)
    transform = train_transform(preprocessing(model), {"re_prob": 0.5})
    method = AutoProg(**MANUAL, stages=2)
    draw = method.loader("train", StepLoader(source, transform, 4))
    assert draw(Step("fit", "main", 0, 2))["image"].shape[-1] == 32  # nothing has grown yet
    model = method.apply(model, method.prepare(model))
    model = method.apply(model, method.enter(model, Phase("fit.stage0", 1)))
    assert draw(Step("fit", "main", 0, 2))["image"].shape[-1] == 16
    method.apply(model, method.enter(model, Phase("fit.stage1", 1)))
    assert draw(Step("fit", "main", 0, 2))["image"].shape[-1] == 32


@pytest.mark.parametrize("reset", [False, True])
def test_moments_stay_with_blocks_unless_reset(reset):
    loop, _, _ = trained(AutoProg(**MANUAL, stages=2, reset_optimizer=reset), tiny_vit(depth=4), steps=8)
    steps = {n: float(s["step"]) for n, s in loop._optim.state_dict()["parameters"].items()}
    assert steps["model.blocks.0.attn.qkv.weight"] == (4 if reset else 8)
    assert steps["model.blocks.1.attn.qkv.weight"] == 4  # new in the second stage
