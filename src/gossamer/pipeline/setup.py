"""Turn a recipe (or objects a caller hands in) into what the loop needs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gossamer.core import registry
from gossamer.core.errors import ModelError, PlanError, RecipeError
from gossamer.core.method import Method
from gossamer.core.schedule import Loader, Plan
from gossamer.core.stack import Stack
from gossamer.cost.budget import METRICS, Target
from gossamer.data.loading import StepLoader
from gossamer.data.sources import ImageSource, hold_out
from gossamer.kits.teacher import bind_self
from gossamer.models.build import load_model
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.models.source import attach, source_of
from gossamer.recipe import Recipe
from gossamer.tasks.registry import task_for
from gossamer.tasks.task import Task

__all__ = ["Setup", "refuse_shared", "set_up"]


@dataclass
class Setup:
    """Everything a run works with.

    Attributes:
        recipe: The resolved recipe.
        model: The model to compress.
        dense: A frozen copy of it before any method; where the recipe pretrains, as pretraining leaves it.
        stack: The methods.
        task: The task.
        preprocessing: Image preprocessing of the model.
        loaders: Step loaders by name: ``train``, ``search`` and ``all`` (see ``DataSettings``), ``calibration``.
        evaluation: Images to evaluate on, or ``None``.
        plan: The recipe's own phases.
        savable: Whether the model can be rebuilt from its source, and so be saved.
    """

    recipe: Recipe
    model: nn.Module
    dense: nn.Module
    stack: Stack
    task: Task
    preprocessing: Preprocessing
    loaders: dict[str, Loader]
    evaluation: ImageSource | None
    plan: Plan
    savable: bool = True

    def adopt(self, model: nn.Module) -> None:
        """Let ``dense`` hold the weights of ``model``, which pretraining has left, and teach with them from now on.

        Raises:
            PlanError: ``model`` is no longer the recipe's.
        """
        trained = model.state_dict()
        own = self.dense.state_dict()
        odd = [k for k, v in own.items() if k not in trained or trained[k].shape != v.shape]
        if odd:
            raise PlanError(
                f"after pretraining the model lacks {odd[0]!r} of the recipe's, or has it in another shape; a method "
                f"that changes the structure for good must act after the phase 'pretrain'"
            )
        self.dense.load_state_dict({k: trained[k] for k in own})
        bind_self(self.stack, self.dense)


def _methods(recipe: Recipe) -> list[Method]:
    """Build the recipe's methods; a target on a metric is handed to the method that takes it and has none."""
    target = recipe.target.model_dump(exclude_none=True) if recipe.target else {}
    entries = [(name, options) for entry in recipe.methods for name, options in entry.items()]
    taken = [
        {f.name for f in dataclasses.fields(registry.find(name))} & METRICS.keys() & target.keys() - set(options)  # type: ignore[arg-type]
        for name, options in entries
    ]
    refuse_shared(target, [(name, keys) for (name, _), keys in zip(entries, taken, strict=True)])
    return [
        registry.build(name, {**{k: target[k] for k in keys}, **options})
        for (name, options), keys in zip(entries, taken, strict=True)
    ]


def refuse_shared(target: Mapping[str, Any], takers: Sequence[tuple[str, Collection[str]]]) -> None:
    """Refuse a bound that several methods would each spend as if it were theirs alone.

    Args:
        target: Bounds by metric.
        takers: Names of methods, and the metrics for which each takes the target.

    Raises:
        RecipeError: Two take the same one.
    """
    for metric in METRICS.keys() & target.keys():
        names = [name for name, keys in takers if metric in keys]
        if len(names) > 1:
            raise RecipeError(
                f"target: {metric}={target[metric]} would be the whole budget of {' and of '.join(names)} alike; "
                f"give each its own, e.g. {names[0]}: {{{metric}: 80%}}"
            )


def _remember_source(model: nn.Module) -> bool:
    """Note on a model how it was built, before anything changes it; false for a user's own class."""
    try:
        attach(model, source_of(model))
    except ModelError:
        return False
    return True


def set_up(
    recipe: Recipe,
    *,
    model: nn.Module | None = None,
    methods: Sequence[Method] | None = None,
    sources: dict[str, ImageSource] | None = None,
    rank: int = 0,
    world: int = 1,
) -> Setup:
    """Build the objects of a run.

    Args:
        recipe: A validated recipe.
        model: Takes the place of the recipe's model.
        methods: Take the place of the recipe's methods.
        sources: Take the place of ``train``, ``eval`` and ``calibration`` data.
        rank: Rank of this process.
        world: Number of processes.

    Raises:
        GossamerError: Whatever of it is wrong, in one line.
    """
    torch.manual_seed(recipe.seed)
    if model is None:
        spec = recipe.model.name + (f"@{recipe.model.weights}" if recipe.model.weights else "")
        model = load_model(
            spec, num_classes=recipe.model.num_classes, pretrained=recipe.model.pretrained, **recipe.model.options
        )
    savable = _remember_source(model)
    pre = preprocessing(model)
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    stack = Stack(methods if methods is not None else _methods(recipe))
    bind_self(stack, dense)
    task = task_for(pre, recipe.task)

    def source(name: str) -> ImageSource | None:
        spec = getattr(recipe.data, name)
        return (sources or {}).get(name) or (None if spec is None else task.open(spec))

    train, evaluation = source("train"), source("eval")
    if evaluation is None and train is not None and recipe.data.eval_share:
        train, evaluation = hold_out(train, recipe.data.eval_share, recipe.seed)
    calibration = source("calibration") or train
    if train is None and recipe.train.trains:
        raise RecipeError("data.train: nothing given, but train.steps or train.epochs ask for training; name images")
    _check_trained(recipe, stack)
    for images in (train, evaluation):
        task.check(images, model)
    loaders = _loaders(recipe, pre, task, train, calibration, rank, world)
    seen = 0 if train is None else len(train) - round(recipe.data.search_share * len(train))
    plan = Plan(recipe.train.phases(seen, world))
    return Setup(recipe, model, dense, stack, task, pre, loaders, evaluation, plan, savable)


def _check_trained(recipe: Recipe, stack: Stack) -> None:
    """Refuse methods that only act on the training of weights where the recipe trains none.

    Methods that change weights, gradients or structure may bring a training of their own: then nothing is said.
    """
    only_training = frozenset({"loss", "gradients"})
    idle = [m for m in stack.methods if m.touches and (m.touches <= only_training or "adversary" in m.touches)]
    others = [m for m in stack.methods if m not in idle]
    if idle and not recipe.train.trains and all(m.touches <= {"tokens", "precision"} for m in others):
        names = ", ".join(type(m).__name__ for m in idle)
        raise RecipeError(
            f"{names}: acts on the training of weights, and the recipe trains none; set train.steps or train.epochs, "
            f"or leave it out"
        )


def _loaders(  # noqa: PLR0913 - the parts of a run come together here
    recipe: Recipe, pre: Preprocessing, task: Task, train: ImageSource | None,
    calibration: ImageSource | None, rank: int, world: int,
) -> dict[str, Loader]:  # fmt: skip
    loaders: dict[str, Loader] = {}
    data, batch = recipe.data, recipe.train.batch_size * world
    common = {"seed": recipe.seed, "workers": data.workers, "rank": rank, "world": world}
    options = task.configure(data)
    if train is not None:
        view = task.train_view(pre, data)
        rest, held = hold_out(train, data.search_share, recipe.seed) if data.search_share else (train, train)
        for name, source in (("train", rest), ("all", train)):
            loaders[name] = StepLoader(source, view, batch, **options, **common)  # type: ignore[arg-type]
        # a search compares models on images as deployment will see them: no augmentation, plain labels
        loaders["search"] = StepLoader(held, task.still_view(pre), batch, **common)  # type: ignore[arg-type]
    if calibration is not None:
        # calibration sees images as deployment will: no augmentation; every rank reads the same ones
        fitting = min(recipe.train.batch_size, len(calibration))
        loaders["calibration"] = StepLoader(calibration, task.still_view(pre), fitting, seed=recipe.seed)
    return loaders


def check_target(recipe: Recipe, dense: dict[str, float], finished: dict[str, float]) -> list[str]:
    """Return one sentence for every bound of the recipe's target that the finished model misses."""
    bounds = recipe.target.model_dump(exclude_none=True) if recipe.target else {}
    return Target.parse(bounds).missed(dense, finished)
