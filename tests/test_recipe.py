"""Recipes: read, write, override, refuse."""

from dataclasses import dataclass

import pytest
import yaml

from gossamer.core import registry
from gossamer.core.errors import RecipeError, StateError
from gossamer.core.method import Method
from gossamer.recipe import Recipe, TrainSettings

TEXT = """
name: small
model: {name: vit_tiny_patch16_224, num_classes: 10}
data: {train: "embedded:search", eval: "embedded:eval"}
methods:
  - toy: {macs: 50%, steps: 7}
train: {steps: 100, lr: 5e-4, precision: no}
target: {macs: "60%", max_drop: 0.5}
export: {formats: [onnx], batch: [1, dynamic]}
"""


@dataclass
class Toy(Method):
    macs: str = "60%"
    steps: int = 3


@pytest.fixture(autouse=True)
def toy_room(monkeypatch):
    entry = registry.MethodInfo("toy", "Toy", "A toy", "", "toys", (), "tokens", (), "baseline", "toys.toy")
    monkeypatch.setattr(registry, "methods", lambda: {"toy": entry})
    monkeypatch.setattr(registry, "find", lambda name: Toy)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    return tmp_path / "r.yaml"


def test_round_trip_and_hash(path, tmp_path):
    recipe = Recipe.from_yaml(path)
    assert recipe.train.lr == 5e-4
    assert recipe.train.precision == "no"
    assert recipe.build_methods() == [Toy("50%", 7)]
    recipe.to_yaml(tmp_path / "again.yaml")
    again = Recipe.from_yaml(tmp_path / "again.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert len(recipe.hash()) == 12
    assert Recipe(**yaml.safe_load(recipe.to_yaml())) == recipe  # plain YAML readers understand it too


def test_overrides(path):
    recipe = Recipe.from_yaml(path, ["train.lr=1e-4", "methods.toy.macs=70%", "methods.0.toy.steps=9", "seed=3"])
    assert (recipe.train.lr, recipe.seed) == (1e-4, 3)
    assert recipe.methods == [{"toy": {"macs": "70%", "steps": 9}}]
    assert recipe.hash() != Recipe.from_yaml(path).hash()


def test_short_forms():
    recipe = Recipe(model="resnet18", methods=["toy", {"Toy": None}])
    assert recipe.model.name == "resnet18"
    assert recipe.methods == [{"toy": {}}, {"toy": {}}]


def test_identity_ignores_what_does_not_change_the_weights(path):
    recipe = Recipe.from_yaml(path)
    same = Recipe.from_yaml(path, ["name=other", "data.workers=2", "train.checkpoint_every=7", "export.threads=3"])
    assert same.identity() == recipe.identity()
    assert Recipe.from_yaml(path, ["train.lr=1"]).identity() != recipe.identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.step=3", r"train\.step: unknown key; allowed are epochs.*did you mean 'steps'\?"),
        ("modle={}", r"modle: unknown key.*did you mean 'model'\?"),
        ("train.lr=fast", r"train\.lr='fast': input should be a valid number"),
        ("train.precision=fp8", r"train\.precision='fp8': input should be 'no', 'bf16' or 'fp16'"),
        ("train.optimizer=adamx", r"train\.optimizer='adamx': unknown optimizer.*did you mean 'adam"),
        ("train.epochs=1", r"epochs and steps are both given"),
        ("train.accumulate=3", r"accumulate=3 does not divide batch_size=32"),
        ("model={}", r"model\.name: is missing"),
        ("methods=[tay]", r"method 'tay' is unknown.*did you mean 'toy'\?"),
        ("methods.toy.mac=1", r"option 'mac' is unknown; options are macs, steps; did you mean 'macs'\?"),
        ("methods.toy.steps=many", r"toy: steps='many'"),
        ("methods=[{toy: 3}]", r"toy: options 3; expected a mapping"),
        ("methods={toy: 3}", r"expected a list of methods"),
        ("methods.tog.macs=1", r"no entry 'tog'; entries are toy; did you mean 'toy'\?"),
        ("export.formats=[tflite]", r"export\.formats\.0='tflite'"),
        ("name.x=1", r"'x' lies inside 'small'"),
        ("seed", r"expected key=value"),
        ("seed={", r"override seed.*expected YAML"),
    ],
)
def test_wrong_recipes_get_one_line(path, change, message):
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.from_yaml(path, [change])
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    for text, message in [
        ("a: [1", "expected YAML"),
        ("- 1", "expected a mapping"),
        ("seed: 1\nseed: 2", "occurs twice"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            Recipe.from_yaml(tmp_path / "bad.yaml")


def test_code_in_a_recipe_is_not_run(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(RecipeError, match="expected YAML"):
        Recipe.from_yaml(tmp_path / "bad.yaml")


def test_newer_format_is_refused(path):
    with pytest.raises(StateError, match="upgrade gossamer"):
        Recipe.from_yaml(path, ["format=2"])


def test_steps_follow_from_epochs():
    assert TrainSettings(epochs=2, batch_size=10).num_steps(95) == 19
    assert TrainSettings(epochs=2, batch_size=10).num_steps(95, world=2) == 10
    assert TrainSettings(steps=7).num_steps(95) == 7
    phase = TrainSettings(warmup=0.2, steps=5).fit_phase(1)
    assert (phase.name, phase.steps, phase.warmup) == ("fit", 5, 0.2)


def test_schema_is_for_editors():
    schema = Recipe.json_schema()
    assert schema["$schema"].startswith("https://json-schema.org")
    assert "train" in schema["properties"]


def test_pretraining_is_a_phase_of_its_own():
    settings = TrainSettings(
        batch_size=10, steps=5, warmup=0.2, pretrain={"epochs": 2, "lr": 1e-3, "warmup": 0.1, "schedule": "constant"}
    )
    first, fit = settings.phases(95)
    assert (first.name, first.steps, first.lr, first.warmup) == ("pretrain", 19, {"weights": 1e-3}, 0.1)
    assert (first.schedule, fit.schedule, first.min_lr_ratio) == ("constant", "cosine", fit.min_lr_ratio)
    assert (fit.name, fit.steps, fit.lr) == ("fit", 5, None)
    assert [p.name for p in TrainSettings(steps=5).phases(95)] == ["fit"]
    with pytest.raises(ValueError, match="either epochs or steps"):
        TrainSettings(pretrain={"lr": 1e-3})
