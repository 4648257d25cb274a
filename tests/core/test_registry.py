"""The registry: cards, names, options, and errors that name the nearest right word."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gossamer.core import registry
from gossamer.core.errors import GossamerError, RecipeError, RunError, nearest
from gossamer.core.method import STAGES

STATUS = {"reproduced", "mathematics checked", "reconstruction", "baseline"}
ROOMS = sorted(registry.methods())


def test_rooms_are_found_without_importing_them() -> None:
    assert "manifold_distillation" in ROOMS and ROOMS == list(registry.methods())


@pytest.mark.parametrize("name", ROOMS)
def test_cards_agree_with_the_classes(name) -> None:
    entry, cls = registry.info(name), registry.find(name)
    assert cls.__name__ == entry.cls and registry.find(entry.cls) is cls
    assert entry.stage == cls.stage in STAGES and set(entry.touches) == set(cls.touches)
    assert entry.status in STATUS and entry.title and entry.family and entry.tasks
    assert registry.name_of(cls()) == name
    assert len(registry.card(name)) > 200 and not registry.card(name).startswith("---")
    assert json.dumps(dataclasses.asdict(entry))


@pytest.mark.parametrize("name", ROOMS)
def test_default_options_round_trip_through_json(name) -> None:
    options = registry.options_of(registry.find(name)())
    assert registry.options_of(registry.build(name, json.loads(json.dumps(options)))) == options


def test_unknown_methods_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'manifold_destillation' is unknown.*did you mean 'manifold_distillation'"):
        registry.info("manifold_destillation")
    assert registry.info("manifold-distillation") == registry.info("ManifoldDistillation")


def test_wrong_options_are_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="option 'w_intera' is unknown.*did you mean 'w_intra'"):
        registry.build("manifold_distillation", {"w_intera": 1.0})
    with pytest.raises(RecipeError, match="tau='hot'.*number"):
        registry.build("manifold_distillation", {"tau": "hot"})


def test_modules_are_named_not_stored() -> None:
    from torch import nn

    method = registry.find("manifold_distillation")(nn.Linear(2, 2))
    assert registry.options_of(method)["teacher"] == "<Linear>"


def test_errors_share_one_root_and_say_how_to_exit() -> None:
    assert issubclass(RecipeError, GossamerError) and RecipeError.exit_code == 2 and RunError.exit_code == 1
    assert nearest("macs", ["macs", "bops"]) == "; did you mean 'macs'?" and nearest("zzz", ["macs"]) == ""
