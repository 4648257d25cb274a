"""Several methods as one: order, conflicts, edits, groups, losses, wrapped gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from gossamer.core.errors import PlanError
from gossamer.core.method import Method
from gossamer.core.schedule import Phase, Plan, Step, Turn
from gossamer.core.stack import Stack

STEP = Step("fit", "main", 0, 4)


def task_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(batch["image"])
    return out, {"task": out.square().mean()}


def toy(stage_: str = "training", touches_: tuple[str, ...] = (), **class_fields: Any) -> Method:
    body = {"stage": stage_, "touches": frozenset(touches_), **class_fields}
    return type("Toy" + stage_.title() + "".join(touches_), (Method,), body)()


@dataclass
class Scale(Method):
    """Multiplies the weight by a decided factor; keeps an edit log."""

    factor: float = 2.0
    stage: ClassVar[str] = "structure"
    touches: ClassVar[frozenset[str]] = frozenset({"structure"})
    applied: list[Any] = field(default_factory=list, init=False)

    def prepare(self, model: nn.Module) -> dict[str, Any]:
        return {"factor": self.factor, "shape": tuple(model.weight.shape)}

    def finish(self, model: nn.Module) -> dict[str, Any]:
        return {"factor": 1.0}

    def apply(self, model: nn.Module, edit: dict[str, Any]) -> nn.Module:
        self.applied.append(edit)
        with torch.no_grad():
            model.weight.mul_(edit["factor"])
        return model


def test_order_follows_stages_then_the_list() -> None:
    given = [toy(s) for s in ("precision", "training", "tokens", "structure", "growth", "training")]
    assert [m.stage for m in Stack(given).methods] == [
        "growth", "structure", "tokens", "training", "training", "precision",
    ]  # fmt: skip
    assert Stack(given).methods[3] is given[1]


@pytest.mark.parametrize("thing", ["tokens", "precision"])
def test_two_methods_may_not_change_the_same_thing(thing) -> None:
    with pytest.raises(PlanError, match=f"both change the model's {thing}"):
        Stack([toy("tokens", (thing,)), toy("precision", (thing,))])
    Stack([toy("structure", ("structure",)), toy("structure", ("structure", "weights"))])


def test_needs_are_met_by_gifts() -> None:
    wants = lambda: toy("training", (), needs={"tokens": "token_source"})  # noqa: E731
    with pytest.raises(PlanError, match="when tokens change it needs 'token_source'"):
        Stack([wants(), toy("tokens", ("tokens",))])
    Stack([wants(), toy("tokens", ("tokens",), gives=frozenset({"token_source"}))])
    Stack([wants()])


def test_strangers_are_refused() -> None:
    with pytest.raises(PlanError, match="got str"):
        Stack(["diffrate"])  # type: ignore[list-item]
    with pytest.raises(PlanError, match="stage 'search'"):
        Stack([toy("search")])


def test_edits_are_plain_json_logged_and_replayed() -> None:
    stack = Stack([Scale(3.0), toy()])
    model = nn.Linear(2, 2)
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    model = stack.finish(stack.prepare(model))
    assert stack.edits == [(0, {"factor": 3.0, "shape": [2, 2]}), (0, {"factor": 1.0})]
    assert stack.lasting_edits() == stack.edits
    again, fresh = Stack([Scale(3.0), toy()]), nn.Linear(2, 2)
    fresh.load_state_dict(dense)
    assert torch.equal(again.replay(fresh, stack.edits).weight, model.weight) and again.edits == stack.edits
    with pytest.raises(NotImplementedError, match="does not define apply"):
        Stack([toy("training", (), prepare=lambda self, model: {"x": 1})]).prepare(model)


def test_edits_of_passing_methods_are_not_saved() -> None:
    class Tap(Scale):
        touches = frozenset({"loss"})

    stack = Stack([Tap(1.0)])
    stack.prepare(nn.Linear(2, 2))
    assert stack.edits and stack.lasting_edits() == []


def test_groups_partition_the_parameters() -> None:
    model = nn.Linear(2, 2)
    named = toy("training", (), groups=lambda self, model: {"bias": [model.bias]})
    groups = Stack([named]).groups(model)
    assert groups["weights"] == [model.weight] and groups["bias"] == [model.bias]
    with pytest.raises(PlanError, match="already in 'bias'"):
        Stack([named, toy("precision", (), groups=lambda self, model: {"other": [model.bias]})]).groups(model)


def test_loss_terms_add_up_and_may_not_clash() -> None:
    model, batch = nn.Linear(2, 2), {"image": torch.ones(3, 2)}
    term = lambda name: toy("training", (), loss=lambda self, m, b, o, s: {name: o.sum()})  # noqa: E731
    logs = Stack([term("extra")]).grads(task_loss)(model, batch, STEP, list(model.parameters()))
    out = model(batch["image"])
    expected = torch.autograd.grad(out.square().mean() + out.sum(), model.weight)[0]
    assert torch.allclose(model.weight.grad, expected) and set(logs) == {"task", "extra"}
    assert not any(v.requires_grad for v in logs.values())
    with pytest.raises(PlanError, match=r"\['extra'\] are already defined"):
        Stack([term("extra"), term("extra")]).grads(task_loss)(model, batch, STEP, [])
    replaced = Stack([term("task")]).grads(task_loss)(model, batch, STEP, [])
    assert torch.allclose(replaced["task"], out.sum())


def test_micro_batches_average_to_the_whole() -> None:
    model, x = nn.Linear(2, 2), torch.randn(4, 2)
    params = list(model.parameters())
    Stack().grads(task_loss)(model, {"image": x}, STEP, params)
    whole = model.weight.grad.clone()
    model.zero_grad()
    halves = lambda batch: [{"image": h} for h in batch["image"].chunk(2)]  # noqa: E731
    Stack().grads(task_loss, micro=halves)(model, {"image": x}, STEP, params)
    assert torch.allclose(model.weight.grad, whole)


def wrapper(name: str, log: list[str], **fields: Any) -> Method:
    def wrap_grads(self, grads, evaluate):
        def wrapped(model, batch, step, params):
            log.append(name)
            evaluate(model, batch, step)
            return grads(model, batch, step, params)

        return wrapped

    return toy("training", (), wrap_grads=wrap_grads, **fields)


def test_wrappers_nest_and_concern_their_group_only() -> None:
    model, batch, log = nn.Linear(2, 2), {"image": torch.ones(3, 2)}, []
    stack = Stack([wrapper("outer", log), wrapper("inner", log), wrapper("arch", log, wraps="arch")])
    stack.grads(task_loss)(model, batch, STEP, list(model.parameters()))
    assert log == ["outer", "inner"]
    assert len(stack.wrappers(Turn(trains=("arch",)))) == 1
    assert stack.wrappers(Turn(objective=lambda m, b, s: {"own": m(b["image"]).sum()})) == []


def test_a_turn_with_its_own_objective_bypasses_losses() -> None:
    model, batch = nn.Linear(2, 2), {"image": torch.ones(3, 2)}
    turn = Turn(objective=lambda m, b, s: {"own": m(b["image"]).sum()})
    stack = Stack([toy("training", (), loss=lambda *a: {"extra": torch.ones(())})])
    assert set(stack.grads(task_loss, turn)(model, batch, STEP, [])) == {"own"}


def test_hooks_reach_every_method_and_state_round_trips() -> None:
    seen: list[str] = []
    spy = lambda n: toy(  # noqa: E731
        "training", (),
        before_step=lambda self, m, s: seen.append(f"before{n}"),
        after_step=lambda self, m, s: seen.append(f"after{n}"),
        state_dict=lambda self: {"n": n}, load_state_dict=lambda self, state: seen.append(f"load{state['n']}"),
        variants=lambda self, m: {f"v{n}": None}, describe=lambda self, m: {"facts": {}},
        phases=lambda self, plan: plan.before("fit", Phase(f"p{n}", 1)),
    )  # fmt: skip
    stack, model = Stack([spy(0), spy(1)]), nn.Linear(2, 2)
    stack.before_step(model, STEP)
    stack.after_step(model, STEP)
    stack.load_state_dict(stack.state_dict())
    assert seen == ["before0", "before1", "after0", "after1", "load0", "load1"]
    assert set(stack.variants(model)) == {"v0", "v1"} and len(stack.describe(model)) == 1
    assert [p.name for p in stack.phases(Plan([Phase("fit", 1)]))] == ["p0", "p1", "fit"]
    with pytest.raises(ValueError, match="shorter|longer"):
        stack.load_state_dict([{"n": 0}])
