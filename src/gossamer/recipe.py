"""What a run is, as validated data: YAML in, YAML out, errors that name the key."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gossamer.core import registry
from gossamer.core.errors import RecipeError, StateError, nearest
from gossamer.core.method import Method
from gossamer.core.schedule import Phase

__all__ = [
    "FORMAT",
    "PRETRAIN",
    "DataSettings",
    "ExportSettings",
    "ModelSettings",
    "PretrainSettings",
    "Recipe",
    "TargetSettings",
    "TrainSettings",
]

FORMAT = 1
"""Version of the recipe file; newer ones are refused."""
PRETRAIN = "pretrain"
"""Name of the training that comes before everything else; what it leaves is the dense model."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Part):
    """Which model. ``name``: timm name, ``name@weights.safetensors``, or a saved folder."""

    name: str
    weights: str | None = None
    num_classes: int | None = Field(default=None, ge=1)
    pretrained: bool = False
    options: dict[str, Any] = {}


class DataSettings(_Part):
    """Which data (``folder:PATH``, ``embedded:search``, ...) and how it is augmented.

    ``search_share`` holds that share of the training images out for searches (loader ``"search"``, shown as at
    evaluation); loader ``"train"`` then sees the rest, ``"all"`` everything. With 0, ``"search"`` reads the
    training images themselves. ``eval_share`` serves where ``eval`` is not given: that share of the training
    images is set aside first, for evaluation alone.
    """

    train: str | None = None
    eval: str | None = None
    calibration: str | None = None
    search_share: float = Field(default=0.0, ge=0, lt=1)
    eval_share: float = Field(default=0.0, ge=0, lt=1)
    workers: int = Field(default=0, ge=0)
    augment: dict[str, Any] = {}
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)


class PretrainSettings(_Part):
    """A training phase (``"pretrain"``) before everything else; what is not given is as in ``train``."""

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: float | None = Field(default=None, ge=0, le=1)
    hold: float | None = Field(default=None, ge=0, le=1)
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _long(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps of the training that comes first")
        return self


class TrainSettings(_Part):
    """The recipe's own training phase (``"fit"``) and the defaults of every other one.

    ``batch_size`` counts images per process and step; ``accumulate`` splits them into micro
    batches. Neither ``epochs`` nor ``steps``: no training of its own. ``ema`` is the decay of a
    moving average of the weights; ``ship`` says whether the finished model holds the average
    (the default, where there is one) or the weights of the last step.
    """

    epochs: float | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, ge=0)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: str = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, le=1)
    hold: float = Field(default=0.0, ge=0, le=1)
    min_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    clip_grad: float | None = Field(default=None, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float | None = Field(default=None, gt=0, lt=1)
    ship: Literal["ema", "last"] = "ema"
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    checkpoint_every: int = Field(default=50, ge=1)
    pretrain: PretrainSettings | None = None

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        from timm.optim import list_optimizers  # slow to import; a recipe is also read by the command line

        known = [str(name) for name in list_optimizers()]
        if value not in known:
            raise ValueError(f"unknown optimizer; common ones are adamw, adam, sgd, lamb{nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both given; keep one")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        return self

    def num_steps(self, num_images: int, world: int = 1) -> int:
        """Return the steps of the fit phase for a training set of ``num_images`` and ``world`` processes."""
        return self._steps(self.steps, self.epochs, num_images, world)

    def _steps(self, steps: int | None, epochs: float | None, num_images: int, world: int) -> int:
        if steps is not None:
            return steps
        return math.ceil((epochs or 0) * num_images / (self.batch_size * world))

    @property
    def trains(self) -> bool:
        """Whether the recipe asks for any training of its own."""
        return bool(self.steps or self.epochs or self.pretrain)

    def fit_phase(self, num_images: int, world: int = 1) -> Phase:
        """Return the recipe's own training as a phase called ``"fit"``."""
        return Phase(
            "fit",
            self.num_steps(num_images, world),
            schedule=self.schedule,
            warmup=self.warmup,
            hold=self.hold,
            min_lr_ratio=self.min_lr_ratio,
        )

    def phases(self, num_images: int, world: int = 1) -> list[Phase]:
        """Return the recipe's own phases: ``"pretrain"`` where it has one, then ``"fit"``."""
        fit, first = self.fit_phase(num_images, world), self.pretrain
        if first is None:
            return [fit]
        given = first.model_dump(exclude_none=True, include={"schedule", "warmup", "hold", "min_lr_ratio"})
        steps = self._steps(first.steps, first.epochs, num_images, world)
        lr = None if first.lr is None else {"weights": first.lr}
        return [replace(fit, name=PRETRAIN, steps=steps, lr=lr, **given), fit]


class TargetSettings(_Part):
    """Bounds to meet: relative (``"60%"`` of dense) or absolute (``"2.9G"``, ``"8M"``, ``"12ms"``)."""

    macs: str | float | None = None
    bops: str | float | None = None
    params: str | float | None = None
    size: str | float | None = None
    memory: str | float | None = None
    latency: str | float | None = None
    max_drop: float | None = Field(default=None, ge=0)


class ExportSettings(_Part):
    """Artefacts to write and runtimes to measure them in.

    Every stage is measured in ``runtimes`` at every number of ``batch``; the finished model is also
    written in every one of ``formats``, with ``"dynamic"`` in ``batch`` for any number of images.
    """

    formats: list[Literal["openvino", "onnx"]] = ["openvino", "onnx"]
    batch: list[int | Literal["dynamic"]] = [1, 8]
    opset: int | None = Field(default=None, ge=13)
    runtimes: list[Literal["openvino", "onnxruntime"]] = Field(default=["openvino", "onnxruntime"], min_length=1)
    threads: int = Field(default=2, ge=1)
    rounds: int = Field(default=7, ge=2)

    @field_validator("batch")
    @classmethod
    def _measurable(cls, value: list[int | str]) -> list[int | str]:
        sizes = [b for b in value if isinstance(b, int)]
        if not sizes or min(sizes) < 1:
            raise ValueError("expected at least one batch size above 0; 'dynamic' may stand beside it")
        return value

    @property
    def sizes(self) -> list[int]:
        """Batch sizes that are measured."""
        return [b for b in self.batch if isinstance(b, int)]


class Recipe(_Part):
    """A whole run.

    ``methods`` is a list of ``{name: options}`` in the order of the stack's ties. ``task`` is a name or
    ``{name: options}``; without it the model says what it is for.
    """

    format: int = FORMAT
    name: str = "run"
    model: ModelSettings
    data: DataSettings = DataSettings()
    task: dict[str, dict[str, Any]] | None = None
    methods: list[dict[str, dict[str, Any]]] = []
    train: TrainSettings = TrainSettings()
    target: TargetSettings | None = None
    export: ExportSettings = ExportSettings()
    seed: int = Field(default=0, ge=0)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as err:
            raise RecipeError(_one_line(type(self), err)) from None

    @field_validator("format")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value > FORMAT:
            raise StateError(f"recipe: format {value}, this gossamer reads up to {FORMAT}; upgrade gossamer")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("task", mode="before")
    @classmethod
    def _named_task(cls, value: Any) -> Any:
        entry = {value: {}} if isinstance(value, str) else value
        if entry is None or (isinstance(entry, Mapping) and len(entry) == 1):
            return entry if entry is None else {str(k): dict(v or {}) for k, v in entry.items()}
        raise ValueError("expected one task name with its options, such as super_resolution: {scale: 2}")

    @field_validator("methods", mode="before")
    @classmethod
    def _named_methods(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("expected a list of methods, such as [{diffrate: {macs: 60%}}]")
        entries = []
        for item in value:
            entry = {item: {}} if isinstance(item, str) else item
            if not isinstance(entry, Mapping) or len(entry) != 1:
                raise ValueError(f"entry {item!r}: expected one method name with its options, such as diffrate: {{}}")
            name, options = next(iter(entry.items()))
            if options is not None and not isinstance(options, Mapping):
                raise ValueError(f"{name}: options {options!r}; expected a mapping of option names to values")
            canonical = registry.info(str(name)).name
            registry.build(canonical, dict(options or {}))
            entries.append({canonical: dict(options or {})})
        return entries

    # -- in and out ------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate plain data.

        Raises:
            RecipeError: A key or value is wrong; the message names it, what is allowed and the nearest right key.
        """
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise RecipeError(f"{where}: got {kind}; expected a mapping with keys {', '.join(cls.model_fields)}")
        for key in content:
            if not isinstance(key, str):
                raise RecipeError(f"{where}: key {key!r} is not a string; allowed are {', '.join(cls.model_fields)}")
        try:
            return cls(**content)
        except RecipeError as err:
            raise RecipeError(f"{where}: {err}") from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file and apply ``key=value`` overrides (``train.lr=1e-4``, ``methods.diffrate.macs=50%``).

        Raises:
            RecipeError: The file is missing, is not YAML, or holds a wrong key or value.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise RecipeError(f"recipe {path}: cannot be read ({err}); give the path of a YAML file") from None
        content = _parse(text, str(path))
        if isinstance(content, dict):
            for item in overrides:
                _override(content, item)
        return cls.from_dict(content, str(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the resolved recipe as YAML; also write it when a path is given."""
        text = yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema, for editors."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}

    # -- use -------------------------------------------------------------------------------------
    def hash(self) -> str:
        """Return 12 hexadecimal digits that change with every value of the resolved recipe."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what an interrupted run must share with the recipe that resumes it."""
        content = self.model_dump(mode="json", exclude={"name", "format", "target", "export"})
        content["data"].pop("workers")
        content["train"].pop("checkpoint_every")
        return content

    def build_methods(self) -> list[Method]:
        """Return fresh method objects."""
        return [registry.build(name, dict(options)) for entry in self.methods for name, options in entry.items()]


# -- YAML ------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """Safe YAML with the 1.2 rules people expect: ``1e-4`` is a number, ``no`` is a word, keys occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that either YAML 1.1 or ``_Loader`` would read as something else."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_BOOL, _WORD = "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (_BOOL, "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, _WORD, list("tTfF"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain data only
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(err, "problem", None) or str(err).splitlines()[0]
        raise RecipeError(f"{where}:{line} {problem}; expected YAML") from None


def _override(content: dict[str, Any], item: str) -> None:
    """Set one ``dotted.key=value`` in place."""
    key, eq, text = item.partition("=")
    if not eq or not key:
        raise RecipeError(f"override {item!r}: expected key=value, such as train.lr=1e-4")
    at: Any = content
    path = key.split(".")
    for name, following in zip(path, [*path[1:], None], strict=True):
        spot: Any = name
        if isinstance(at, list):
            spot = _list_spot(at, name, key)
            if isinstance(at[spot], str):
                at[spot] = {at[spot]: None}
            if not name.isdigit():
                at, spot = at[spot], next(iter(at[spot]))
        if not isinstance(at, dict | list):
            raise RecipeError(f"override {key}: {name!r} lies inside {at!r}, which holds no keys")
        if following is None:
            at[spot] = _parse(text, f"override {key}")
        else:
            if isinstance(at, dict) and isinstance(at.get(spot), str) and spot == "model":
                at[spot] = {"name": at[spot]}
            if isinstance(at, dict) and at.get(spot) is None:
                at[spot] = {}
            at = at[spot]


def _list_spot(entries: list[Any], name: str, key: str) -> int:
    names = [e if isinstance(e, str) else next(iter(e), "") if isinstance(e, dict) else "" for e in entries]
    if name.isdigit() and int(name) < len(entries):
        return int(name)
    if name in names:
        return names.index(name)
    raise RecipeError(f"override {key}: no entry {name!r}; entries are {', '.join(names)}{nearest(name, names)}")


# -- errors ----------------------------------------------------------------------------------------
def _section(kind: type[BaseModel], loc: Iterable[Any]) -> type[BaseModel] | None:
    """Return the settings class that the keys of ``loc`` lead to."""
    at: type[BaseModel] | None = kind
    for key in loc:
        field = at.model_fields.get(str(key)) if at is not None else None
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        at = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return at


def _one_line(kind: type[BaseModel], err: ValidationError) -> str:
    first = err.errors()[0]
    loc = [str(p) for p in first["loc"]]
    key = ".".join(loc) or "recipe"
    if first["type"] == "extra_forbidden":
        section = _section(kind, loc[:-1])
        allowed = list(section.model_fields) if section is not None else []
        return f"{key}: unknown key; allowed are {', '.join(allowed)}{nearest(loc[-1], allowed)}"
    if first["type"] == "missing":
        return f"{key}: is missing; give it a value"
    message = first["msg"].removeprefix("Value error, ")
    got = first["input"]
    shown = repr(got) if not isinstance(got, dict | list) or len(repr(got)) < 60 else type(got).__name__
    return f"{key}={shown}: {message[0].lower()}{message[1:]}"
