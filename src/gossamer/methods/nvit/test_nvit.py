"""NViT: oracles of the released code, properties of the rounds, teachers, bad input."""

from __future__ import annotations

import copy
import json
import tomllib
from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError, RecipeError, RunError
from gossamer.core.schedule import Phase, Plan, Step
from gossamer.core.stack import Stack
from gossamer.cost.latency_table import Grid, LatencyTable, Setting, released_grid
from gossamer.cost.ledger import cost
from gossamer.kits.example import MethodExample, noise, tiny_vit
from gossamer.kits.structure.ranking import form_groups
from gossamer.kits.structure.scoring import gradient_scores
from gossamer.kits.structure.vit import counts_of, open_blocks, vit_structures
from gossamer.kits.teacher import bind_self
from gossamer.methods.nvit import NViT
from gossamer.methods.nvit.maths import RELEASED_SECONDS, hard_label_loss, kl_loss
from gossamer.methods.nvit.method import PRUNE
from gossamer.models.widths import build_vit, widths_of

ROOM = resources.files("gossamer.methods.nvit")
FIGURES = {f["name"]: f for f in tomllib.loads(ROOM.joinpath("figures.toml").read_text(encoding="utf-8"))["figure"]}
ORACLE: dict[str, Any] = json.loads(ROOM.joinpath("oracle.json").read_text(encoding="utf-8"))
SMALL = {"emb": 8, "head": 1, "qk": 4, "v": 4, "mlp": 16}
DEPTH, EMBED, HEADS, WIDTH, HIDDEN = 12, 32, 4, 16, 48


# -- oracles: the released pruning_engine_general.py on a model filled by a formula ---------------------


def _fill(name: str, shape: torch.Size, k: int) -> Tensor:
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    seed = sum(ord(c) for c in name) % 97
    return torch.tensor(np.sin(0.7 * i + seed + k * 1.3) * (0.5 + 0.1 * k)).reshape(shape)


def _oracle_model() -> nn.Module:
    widths = {"embed": EMBED, "heads": [HEADS] * DEPTH, "qk": WIDTH, "v": WIDTH, "mlp": HIDDEN}
    model = build_vit(widths, distilled=True, img_size=32, patch_size=8, num_classes=5).double()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(_fill(n, p.shape, 0))
    return model


def _set_grads(model: nn.Module, k: int) -> None:
    for n, p in model.named_parameters():
        p.grad = _fill(n, p.shape, k) * 1e-3


def _oracle_table() -> dict[str, Any]:
    def ms(e: int, h: int, q: int, v: int, m: int) -> float:
        return 1e-3 * (5 + e * (h * (q + v) / 40 + m / 24) / 64 + h * (q + v) / 20)

    heads, widths, hidden = (1, 3, 6, 9, 12), (1, 16, 32, 48, 64), range(0, 3073, 128)
    measured = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {f"V_{v}": {f"MLP_{max(m, 1)}": ms(e, h, q, v, m) for m in hidden} for v in widths}
            for h in heads
            for q in widths
        }
        for e in (256, 512, 768)
    }
    setting = Setting("formula", "openvino", "f32", 2, 8, 18)
    return LatencyTable(setting, (released_grid(measured),)).to_json()


def test_scores_as_released() -> None:
    model = _oracle_model()
    _set_grads(model, 1)
    structures = vit_structures(model)
    weights = dict(model.named_parameters())
    grads = {n: p.grad for n, p in weights.items() if p.grad is not None}
    ours = gradient_scores(weights, grads, structures, "fisher_group")
    assert list(ours) == list(ORACLE["scores"])
    for name, theirs in ORACLE["scores"].items():
        expected = torch.tensor(theirs, dtype=torch.float64)
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


def test_groups_as_released() -> None:
    scores = {k: torch.tensor(v, dtype=torch.float64) for k, v in ORACLE["scores"].items()}
    sizes = {"emb": 16, **{f"blocks.{b}.{k}": s for b in range(DEPTH) for k, s in
                           (("head", 2), ("qk", 8), ("v", 8), ("mlp", 16))}}  # fmt: skip
    for row in form_groups(scores, sizes):
        theirs = ORACLE["groups"][row[0].structure]
        assert [sorted(g.units) for g in row] == [units for units, _ in theirs]
        assert [g.score for g in row] == pytest.approx([score for _, score in theirs], rel=1e-12)


def test_rounds_as_released() -> None:
    """Six rounds with momentum, its reset, the latency term, the threshold: the same units go in every one."""
    model, table = _oracle_model(), _oracle_table()
    dense = LatencyTable.from_json(table).model(widths_of(model).points())
    method = NViT(
        latency="95%", table=table, group_sizes="released", heads_first=False, interval=2, groups_per_round=4,
        eta=ORACLE["eta"] * dense / RELEASED_SECONDS,
    )  # fmt: skip
    model = method.apply(model, method.prepare(model) or {})
    model = method.apply(model, method.enter(model, Phase(PRUNE, 12)) or {})
    state = method._open
    assert state is not None
    for r, theirs in enumerate(ORACLE["rounds"]):
        for b in range(2):
            step = Step(PRUNE, "main", 2 * r + b, 12)
            _set_grads(model, 1 + 2 * r + b)
            method.before_step(model, step)
            method.after_step(model, step)
        gone = {k: (~m).nonzero().flatten().tolist() for k, m in state.keep.items() if not bool(m.all())}
        assert gone == theirs["gone"], f"round {r}"
        assert state.bounds.costs.latency(counts_of(state.keep)) == pytest.approx(theirs["latency"], abs=1e-9)


def test_released_latency_of_deit_b() -> None:
    assert RELEASED_SECONDS == pytest.approx(12 * FIGURES["released_block_seconds"]["value"], rel=1e-4)


@pytest.mark.parametrize("name", ["deit_b", "deit_s", "deit_t", "nvit_b_average"])
def test_params_and_macs_of_the_sheets_models(name: str) -> None:
    shape = FIGURES[f"{name}_params"]["widths"]
    with torch.device("meta"):
        counted = cost(build_vit({**shape, "heads": [shape["heads"]] * 12}, distilled=True), saved=False)
    for what, value in (("params", counted.params), ("macs", counted.macs)):
        figure = FIGURES[f"{name}_{what}"]
        assert value == pytest.approx(figure["value"], rel=figure["tolerance"])


# -- properties -----------------------------------------------------------------------------------------


def _example(**options: Any) -> MethodExample:
    given: dict[str, Any] = {
        "macs": "60%", "rounds": 4, "interval": 2, "group_sizes": SMALL, "heads_first": False, "lr": 1e-3,
        "kl_weight": 1.0, "fit_kl_weight": 1.0, **options,
    }  # fmt: skip
    name = given.pop("model", "vit_tiny_patch16_224")
    return MethodExample(method=lambda: NViT(**given), model=lambda: tiny_vit(name))


def _pruned(*, cut: tuple[str, int] | None = None, **options: Any) -> tuple[nn.Module, Stack]:
    """Run an example by hand; ``cut``: phase and step before which everything is rebuilt from what is saved."""
    example = _example(**options)
    stack, model = Stack([example.method()]), example.model()
    bind_self(stack, model)
    model = stack.prepare(model)
    phases = list(stack.phases(Plan(example.plan)))
    for n in range(len(phases)):
        phase = phases[n]
        model = stack.enter(model, phase)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for i in range(phase.steps):
            if cut == (phase.name, i):
                stack, model, optimiser = _rebuilt(example, stack, model, optimiser)
                phases = list(stack.phases(Plan(example.plan)))
                phase = phases[n]
            step = Step(phase.name, "main", i, phase.steps)
            if phase.until is not None and phase.until(model):
                break
            if phase.work is not None:
                phase.work(model, {}, step)
                continue
            turn = phase.turns[0]
            stack.grads(_task, turn)(model.train(), noise(step), step, list(model.parameters()))
            stack.before_step(model, step)
            optimiser.step()
            optimiser.zero_grad()
            stack.after_step(model, step)
        model = stack.leave(model, phase)
    return stack.finish(model).eval(), stack


def _rebuilt(
    example: MethodExample, stack: Stack, model: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[Stack, nn.Module, torch.optim.Optimizer]:
    """Return what a new process would make of the edits and states of an interrupted one."""
    again, fresh = Stack([example.method()]), example.model()
    bind_self(again, fresh)
    fresh = again.replay(fresh, json.loads(json.dumps(stack.edits)))
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(stack.state_dict()))
    other = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    return again, fresh, other


def _differing(a: nn.Module, b: nn.Module) -> list[str]:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return [n for (n, x), (_, y) in pairs if x.shape != y.shape or not torch.equal(x, y)]


def _seen(example: MethodExample) -> tuple[list[dict[str, int]], list[float], nn.Module]:
    """Run pruning by hand; return the counts and costs after every step."""
    method, model = example.method(), example.model()
    assert isinstance(method, NViT)
    stack = Stack([method])
    bind_self(stack, model)
    model = stack.prepare(model)
    phase = stack.phases(Plan([Phase("fit", 0)]))[-2]
    model = stack.enter(model, phase)
    grads, params = stack.grads(_task, phase.turns[0]), stack.groups(model)["weights"]
    optimiser = torch.optim.AdamW(params, lr=method.lr)
    counts, costs = [], []
    for i in range(phase.steps):
        if phase.until is not None and phase.until(model):
            break
        step = Step(PRUNE, "main", i, phase.steps)
        grads(model.train(), noise(step), step, params)
        stack.before_step(model, step)
        optimiser.step()
        optimiser.zero_grad()
        stack.after_step(model, step)
        state = method._open
        assert state is not None
        counts.append(counts_of(state.keep))
        costs.append(state.bounds.costs.function(state.bounds.metric)(counts[-1]))
    return counts, costs, model


def _task(model: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    out = model(batch["image"])
    return out, {"task": torch.nn.functional.cross_entropy(out, batch["target"])}


def test_cost_never_rises_and_the_budget_is_met_closely() -> None:
    counts, costs, model = _seen(_example())
    assert all(b <= a for a, b in zip(costs, costs[1:], strict=False))
    dense = cost(tiny_vit(), saved=False).macs
    assert 0.5 * dense < costs[-1] <= 0.6 * dense
    removed = model.get_parameter("blocks.0.mlp.fc1.weight").abs().sum(1) == 0
    assert int(removed.sum()) == tiny_vit().blocks[0].mlp.fc1.out_features - counts[-1]["blocks.0.mlp"]


def test_groups_per_round_as_published() -> None:
    """Two groups a round, one in the first; without a latency term and ties exactly so."""
    options = {"rounds": None, "interval": 1, "eta": 0.0, "macs": "75%", "structures": ["mlp"]}
    counts, _, _ = _seen(_example(**options))
    gone = [sum(128 - n for n in seen.values()) // SMALL["mlp"] for seen in counts]
    assert len(gone) > 4 and gone == [max(1, 2 * i) for i in range(len(gone))]


def test_the_finished_model_is_dense_and_meets_the_budget() -> None:
    for options in ({}, {"macs": None, "params": "50%"}, {"params": "50%"}):
        model, stack = _pruned(**options)
        counted, dense = cost(model, saved=False), cost(tiny_vit(), saved=False)
        assert counted.macs <= 0.6 * dense.macs or options.get("macs", "") is None
        assert counted.params <= 0.5 * dense.params or "params" not in options
        facts = stack.describe(model)["NViT"]["facts"]
        if "macs_predicted" in facts:
            assert facts["macs_predicted"] == counted.macs


def _table(slopes: dict[str, float]) -> dict[str, Any]:
    """Return a table in which each width costs so much a unit."""
    tops = {"embed": 32, "heads": 2, "qk": 16, "v": 16, "mlp": 128}
    parts = tuple(Grid({k: [0, n]}, [0.0, n * slopes.get(k, 0.0)]) for k, n in tops.items())
    setting = Setting("formula", "openvino", "f32", 2, 8, 17)
    return LatencyTable(setting, (*parts, Grid({"embed": [32]}, [1.0]))).to_json()


def test_a_large_latency_term_takes_what_costs_most() -> None:
    counts, _, _ = _seen(
        _example(macs=None, latency="80%", table=_table({"qk": 1.0, "v": 0.01, "mlp": 0.01}), eta=1e6, rounds=3)
    )
    dense = {"emb": 32, "head": 2, "qk": 16, "v": 16, "mlp": 128}
    pruned = {k for k, n in counts[-1].items() if n < dense[k.rpartition(".")[2]]}
    assert pruned and all(k.endswith(".qk") for k in pruned)


def test_without_latency_slopes_eta_changes_nothing() -> None:
    options = {"macs": "60%", "rounds": None, "groups_per_round": 6, "interval": 1}
    flat = [_seen(_example(eta=eta, structures=["mlp"], **{**options, "macs": "80%"}))[0] for eta in (0.0, 1e-12)]
    assert flat[0] == flat[1]


def test_heads_come_first() -> None:
    counts, _, _ = _seen(_example(heads_first=True, macs="80%"))
    for seen in counts:
        for b in range(3):
            if seen[f"blocks.{b}.head"] > 1:
                assert seen[f"blocks.{b}.qk"] == seen[f"blocks.{b}.v"] == 16


def test_tiles_round_what_is_left() -> None:
    model, _ = _pruned(group_sizes="tiles", heads_first=True, macs="60%", structures=["mlp", "head"])
    assert all(m % 16 == 0 for m in widths_of(model).mlp)


@pytest.mark.parametrize("criterion", ["taylor_elem", "magnitude", "random"])
def test_other_criteria_work_and_choose_otherwise(criterion: str) -> None:
    ours, theirs = (_pruned(criterion=c)[0] for c in ("fisher_group", criterion))
    assert cost(theirs, saved=False).macs <= 0.6 * cost(tiny_vit(), saved=False).macs
    assert widths_of(ours) != widths_of(theirs)


def test_scratch_keeps_the_widths_and_not_the_weights() -> None:
    kept, _ = _pruned()
    fresh, _ = _pruned(scratch=3)
    again, _ = _pruned(scratch=3)
    assert widths_of(kept) == widths_of(fresh)
    assert _differing(kept, fresh) and not _differing(fresh, again)


# -- teachers ---------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    p, q = (b / 3).softmax(-1), (a / 3).log_softmax(-1)
    assert kl_loss(a, b, 3.0).item() == pytest.approx((p * (p.log() - q)).sum().item() / 2)
    # the release: nn.KLDivLoss() averages over batch and classes
    released = torch.nn.functional.kl_div(q, p, reduction="none").mean()
    assert 1e5 * released.item() == pytest.approx(1e5 / 2 * kl_loss(a, b, 3.0).item())
    assert hard_label_loss(a, b).item() == pytest.approx(
        torch.nn.functional.cross_entropy(a, torch.tensor([1, 1])).item()
    )


def _terms(method: NViT, model: nn.Module, phase: str, round_: int = 1) -> dict[str, Tensor]:
    """Return the terms of one step of a phase."""
    stack = Stack([method])
    bind_self(stack, copy.deepcopy(model))
    model = stack.prepare(model)
    phases = {p.name: p for p in stack.phases(Plan([Phase("fit", 2)]))}
    model = stack.enter(model, phases[PRUNE])
    assert method._open is not None
    method._open.round = round_
    step = Step(phase, "main", 0, 2)
    return stack.grads(_task, phases[phase].turns[0])(model.train(), noise(step), step, list(model.parameters()))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_both_teachers_while_pruning_and_after(name: str) -> None:
    labels, dense, image = tiny_vit(embed_dim=16), tiny_vit(name), noise(Step("fit", "main", 0, 2))
    options: dict[str, Any] = {"macs": "60%", "rounds": 2, "group_sizes": SMALL, "cnn_teacher": labels}
    student = tiny_vit(name)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.05)
    method = NViT(teacher=dense, kl_weight=2.0, fit_kl_weight=2.0, **options)
    terms = _terms(method, student, "fit")
    assert terms.keys() == {"task", "nvit.cnn", "nvit.kl"}
    two = hasattr(student, "head_dist")
    out, theirs = (_heads(m, image["image"]) for m in (student, dense.eval()))
    expected = sum(kl_loss(o, t, 20.0) for o, t in zip(out, theirs, strict=True))
    assert terms["nvit.kl"].item() == pytest.approx(expected.item() if two else expected.item(), rel=1e-3)
    taught = labels(image["image"])
    assert terms["nvit.cnn"].item() == pytest.approx(0.5 * hard_label_loss(out[1], taught).item(), rel=1e-4)
    mean = torch.stack(out).mean(0)
    assert terms["task"].item() == pytest.approx(
        0.5 * torch.nn.functional.cross_entropy(mean, image["target"]).item(), rel=1e-4
    )


def _heads(model: nn.Module, image: Tensor) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    names = [n for n in ("head", "head_dist") if isinstance(getattr(model, n, None), nn.Linear)]
    handles = [
        getattr(model, n).register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, o.detach())) for n in names
    ]
    with torch.no_grad():
        model(image)
    for h in handles:
        h.remove()
    return [seen["head"], seen[names[-1]]]


def test_the_dense_teacher_starts_after_the_first_round() -> None:
    options: dict[str, Any] = {"macs": "60%", "rounds": 2, "group_sizes": SMALL}
    assert "nvit.kl" not in _terms(NViT(**options), tiny_vit(), PRUNE, round_=0)
    assert "nvit.kl" in _terms(NViT(**options), tiny_vit(), PRUNE, round_=1)
    assert "nvit.kl" not in _terms(NViT(distil_fit=False, **options), tiny_vit(), "fit")


def test_pruning_in_evaluation_mode_after_the_first_round() -> None:
    modes: list[bool] = []

    class Watch(NViT):
        def prune_objective(self, model: nn.Module, batch: Any, step: Step) -> dict[str, Tensor]:
            terms = super().prune_objective(model, batch, step)
            modes.append(model.training)
            return terms

    stack, model = Stack([Watch(macs="60%", rounds=2, interval=2, group_sizes=SMALL)]), tiny_vit()
    bind_self(stack, model)
    model = stack.prepare(model)
    phase = stack.phases(Plan([Phase("fit", 0)]))[0]
    model = stack.enter(model, phase)
    for i in range(4):
        step = Step(PRUNE, "main", i, 4)
        stack.grads(_task, phase.turns[0])(model.train(), noise(step), step, list(model.parameters()))
        stack.before_step(model, step)
        stack.after_step(model, step)
    assert modes == [True, True, False, False]


# -- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [("nvit.measure", 2), ("nvit.prune", 1), ("nvit.prune", 3), ("fit", 1)])
def test_resume_inside_every_phase(monkeypatch: pytest.MonkeyPatch, cut: tuple[str, int]) -> None:
    """A distilled model, its table measured on the way; figures that do not depend on the clock make it comparable."""
    from gossamer.kits.structure import measuring

    def fixed(self: Any, index: int) -> dict[str, Any]:
        point = self.points[index]
        relative = {"model": 9.0, "rest": 1.0}.get(point.part, 0.01 * sum(point.at.values()))
        return {"reference_ms": 1.0, "relative": relative, "reason": ""}

    monkeypatch.setattr(measuring.BlockMeter, "measure", fixed)
    options: dict[str, Any] = {
        "macs": None, "latency": "80%", "runtime": "torch", "model": "deit_tiny_distilled_patch16_224", "rounds": 2,
        "structures": ["head", "mlp"],
    }  # fmt: skip
    (whole, stack), (other, again) = _pruned(**options), _pruned(cut=cut, **options)
    assert not _differing(whole, other)
    assert stack.edits == again.edits
    assert [e["do"] for _, e in stack.edits] == ["plan", "table", "open", "cut"]


def test_a_table_is_kept_in_its_file_and_a_foreign_one_warned_of(tmp_path) -> None:
    path = str(tmp_path / "table.json")
    data = _table({"qk": 1.0, "mlp": 0.05})
    LatencyTable.from_json(data).save(path)
    method = NViT(latency="80%", table=path, rounds=2, group_sizes=SMALL, runtime="torch")
    with pytest.warns(UserWarning, match=r"another device.*measure it again with remeasure=true"):
        edit = method.prepare(tiny_vit())
    assert edit is not None and edit["points"] == 0 and edit["table"] == data
    again = NViT(latency="80%", table=path, remeasure=True, rounds=2, group_sizes=SMALL, runtime="torch")
    edit = again.prepare(tiny_vit())
    assert edit is not None and edit["points"] > 10 and edit["table"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "1%"}, r"macs='1%' is .* Reachable are .* G to .* G \(.*% to 100% of the dense model\)"),
        ({}, "no budget; give latency='50%'"),
        ({"macs": "60"}, "Reachable are"),
        ({"latency": "1ms", "table": _table({"qk": 1.0})}, r"latency='1ms' is 1 ms; no widths can meet it. Reachable"),
        ({"macs": "60%", "criterion": "fisher"}, "did you mean 'fisher_group'"),
        ({"macs": "60%", "group_sizes": {"heads": 2}}, "did you mean 'head'"),
        ({"macs": "60%", "group_sizes": "tile"}, "'tiles', 'released'"),
        ({"macs": "60%", "structures": []}, "structures is empty"),
        ({"macs": "60%", "structures": ["heads"]}, "did you mean 'head'"),
        ({"macs": "60%", "momentum": 1.0}, "expected 0 to below 1"),
        ({"macs": "60%", "rounds": 0}, "expected 1 or more"),
        ({"macs": "60%", "kl_temperature": 0.0}, "expected more than 0"),
        ({"latency": "60%", "runtime": "openvno"}, "did you mean 'openvino'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NViT(**options).prepare(tiny_vit())


def test_bad_models_and_teachers_are_named() -> None:
    with pytest.raises(ModelError, match="'q_norm', 'k_norm'"):
        NViT(macs="60%").prepare(tiny_vit(qk_norm=True))
    with pytest.raises(ModelError, match="cnn_teacher has 7 classes, the student 10"):
        other = tiny_vit()
        other.reset_classifier(7)
        _pruned(cnn_teacher=other)
    with pytest.raises(RunError, match="the budget is not met"):
        method = NViT(macs="60%", rounds=4, interval=2, group_sizes=SMALL)
        model = method.apply(tiny_vit(), method.prepare(tiny_vit()) or {})
        model = method.apply(model, method.enter(model, Phase(PRUNE, 2)) or {})
        method.leave(model, Phase(PRUNE, 2))


def test_open_blocks_leaves_the_function_alone() -> None:
    model, image = tiny_vit("deit_tiny_distilled_patch16_224"), noise(Step("x", "main", 0, 1))["image"]
    expected = model(image)
    open_blocks(model)
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)
