"""Steps, turns, phases and plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import PlanError
from gossamer.core.schedule import Phase, Plan, Step, Turn

NAMES = st.text(min_size=1, max_size=12)


def test_step_is_frozen_and_its_generator_is_fresh() -> None:
    step = Step("fit", "main", 3, 8, seed=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.index = 4  # type: ignore[misc]
    a, b = (torch.randn(4, generator=step.generator("bits")) for _ in range(2))
    assert torch.equal(a, b)  # both passes of a two-pass step see the same draw


@given(seed=st.integers(0, 2**31), index=st.integers(0, 10**6), name=NAMES, phase=NAMES)
def test_key_depends_on_everything_but_turn_and_rank(seed, index, name, phase) -> None:
    step = Step(phase, "main", index, 10**6, seed, rank=0)
    assert 0 <= step.key(name) < 2**56
    assert step.key(name) == dataclasses.replace(step, turn="other", rank=3).key(name)
    assert step.key(name, per_rank=True) != dataclasses.replace(step, rank=3).key(name, per_rank=True)
    others = [
        dataclasses.replace(step, index=index + 1),
        dataclasses.replace(step, seed=seed + 1),
        dataclasses.replace(step, phase=phase + "x"),
    ]
    assert len({step.key(name), step.key(name + "x"), *(o.key(name) for o in others)}) == 5


def test_key_is_stable_over_releases() -> None:
    assert Step("fit", "main", 0, 1).key("bits") == 6960872076858502


def test_phase_refuses_negative_steps() -> None:
    with pytest.raises(PlanError, match="steps=-1"):
        Phase("fit", -1)


def names(plan: Plan) -> list[str]:
    return [p.name for p in plan]


def test_plan_is_edited_by_its_verbs_only() -> None:
    plan = Plan([Phase("fit", 8)])
    searched = plan.before("fit", Phase("diff.search", 2, (Turn(trains=("arch",)),)))
    assert names(plan) == ["fit"] and names(searched) == ["diff.search", "fit"]
    assert names(searched.after("fit", Phase("bn", 1))) == ["diff.search", "fit", "bn"]
    cycles = searched.swap("fit", lambda p: [dataclasses.replace(p, name=f"fit.{k}", steps=4) for k in range(2)])
    assert names(cycles) == ["diff.search", "fit.0", "fit.1"]
    assert names(cycles.before("fit", Phase("a", 1))) == ["diff.search", "a", "fit.0", "fit.1"]
    assert names(cycles.after("fit", Phase("z", 1)))[-1] == "z"


def test_join_reaches_only_turns_that_train_the_named_group() -> None:
    plan = Plan([Phase("search", 1, (Turn(trains=("arch",)),)), Phase("fit", 1)]).join("scales", where="weights")
    assert plan[0].turns[0].trains == ("arch",) and plan[1].turns[0].trains == ("weights", "scales")


@pytest.mark.parametrize("verb", ["before", "after"])
def test_unknown_phase_is_named(verb) -> None:
    with pytest.raises(PlanError, match="no phase 'fitt'.*\\['fit'\\]"):
        getattr(Plan([Phase("fit", 1)]), verb)("fitt", Phase("x", 1))
    with pytest.raises(PlanError, match="no phase 'fitt'"):
        Plan([Phase("fit", 1)]).swap("fitt", lambda p: [p])


def test_part_of_a_part_keeps_its_place_in_the_whole() -> None:
    fit = Phase("fit", 100, warmup=0.1)
    late = fit.part("fit.late", 60, 40)
    last = late.part("fit.last", 30, 10)
    assert (last.window.name, last.window.offset, last.window.total) == ("fit", 90, 100)
    assert last.ends_window and not fit.part("fit.early", 0, 60).ends_window and fit.ends_window
    drawn = last.drawn(Step("fit.last", "main", 3, 10, seed=4, rank=1))
    assert drawn == Step("fit", "main", 93, 100, seed=4, rank=1)
    with pytest.raises(PlanError, match="must end within the whole"):
        fit.part("fit.long", 60, 41)
