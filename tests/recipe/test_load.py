"""From a file to a typed recipe: what each part becomes, and what the schema guarantees."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from mil_cli.errors import RecipeErrors
from mil_cli.recipe.load import build_recipe, load_recipe
from mil_cli.recipe.locations import configs_folder, recipes_folder
from mil_cli.stages.registry import METHODS, config_type
from mil_cli.training.config import TrainerConfig

Write = Callable[..., Path]


def test_every_part_is_typed(write: Write) -> None:
    path = write()
    recipe = load_recipe(path)
    assert recipe.name == "recipe"
    assert recipe.root == path.parent
    assert recipe.model.target == "mil_cli.models.convnet.convnet"
    assert recipe.chain == ("prune", "recover", "quantize")
    assert [recipe.stages[name].family for name in recipe.chain] == ["prune", "distill", "quantize"]
    assert recipe.baseline is not None
    assert recipe.baseline.method == "supervised"
    assert recipe.goals.asked() == {
        "quality": {"max_drop": 0.01},
        "size": {"max": 100_000.0},
        "latency": {"max_ratio": 0.5},
    }
    assert recipe.measure.rounds == 60


def test_overrides_reach_the_typed_parts(write: Write) -> None:
    overrides = ["seed=7", "stages.prune.macs=6M", "trainer.epochs=3", "baseline=null", "goals.params.max_ratio=0.5"]
    recipe = load_recipe(write(), [*overrides, "name=other", "stages.recover.trainer.epochs=2"])
    assert (recipe.seed, recipe.trainer.epochs, recipe.baseline, recipe.name) == (7, 3, None, "other")
    assert recipe.stages["prune"].model_dump()["macs"] == "6M"
    assert recipe.stages["recover"].model_dump()["trainer"] == {"epochs": 2}
    assert recipe.goals.params is not None


def test_another_optimizer_takes_nothing_of_the_first(write: Write) -> None:
    recipe = load_recipe(
        write(("  - _self_\n", "  - override /optimizer@trainer.optimizer: adamw\n  - _self_\n")),
        ["trainer.optimizer.lr=0.002"],
    )
    assert recipe.trainer.optimizer == {"_target_": "torch.optim.AdamW", "lr": 0.002, "weight_decay": 0.05}
    assert load_recipe(write()).trainer == TrainerConfig()


def test_a_recipe_cannot_be_changed(write: Write) -> None:
    recipe = load_recipe(write())
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]


def test_resolved_is_plain_and_gives_the_same_recipe_again(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(), ["stages.prune.macs=0.25"])
    text = yaml.safe_dump(recipe.resolved)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    loaded = load_recipe(again)
    assert loaded.stages == recipe.stages
    assert loaded.goals == recipe.goals
    assert loaded.trainer == recipe.trainer


def test_a_stage_outside_the_chain_is_kept_for_fine_tuning(write: Write) -> None:
    recipe = load_recipe(write(), ["chain=[prune,quantize]", "stages.prune.recover=recover"])
    assert set(recipe.stages) == {"prune", "recover", "quantize"}


def test_problems_of_independent_parts_come_together(write: Write) -> None:
    path = write(("prune: {macs: 0.5}", "prune: {macs: 5.0, stepss: 2}"), ("chain: [prune,", "chain: [prun,"))
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, ["seed=-1", "device.threads=0", "trainer.epochs=x", "+foo=1"])
    assert {problem.where for problem in caught.value.problems} == {
        "foo",
        "seed",
        "trainer.epochs",
        "device.threads",
        "stages.prune.macs",
        "stages.prune.stepss",
        "chain[0]",
    }
    assert all(problem.hint for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"name": ".."}, "name"),
        ({"name": "a/b"}, "name"),
        ({"stages": {"../../x": {"family": "quantize", "method": "static"}}}, "stages"),
        ({"stages": {"q": {"family": "quantize", "method": "mixed", "average_bits": 4, "by": "lsqq"}}}, "stages.q.by"),
        ({"stages": {"q": {"family": "quantize", "method": "mixed", "average_bits": 4, "by": "prune"}}}, "stages.q.by"),
        ({"stages": {"d": {"family": "distill", "method": "assistants", "by": "quantize"}}}, "stages.d.by"),
        ({"goals": {"quality": {"max_drop": math.nan}}}, "goals.quality.max_drop"),
    ],
)
def test_what_would_go_wrong_after_hours_is_refused_at_once(write: Write, change: dict[str, Any], where: str) -> None:
    path = write()
    content = load_recipe(path).resolved
    stages = {**content["stages"], **change.get("stages", {})}
    with pytest.raises(RecipeErrors) as caught:
        build_recipe({**content, **change, "stages": stages}, path=path)
    assert [problem.where for problem in caught.value.problems] == [where]


@pytest.mark.parametrize("name", ["a", ".a", "..a", "...", "a.b", "a b", "\N{GREEK SMALL LETTER ALPHA}"])
def test_names_of_folders_may_be_odd(write: Write, name: str) -> None:
    assert load_recipe(write(), [f"name='{name}'"]).name == name


def test_content_that_is_built_in_memory(write: Write) -> None:
    path = write()
    recipe = load_recipe(path)
    assert build_recipe(recipe.resolved, path=path).stages == recipe.stages


@pytest.mark.parametrize("file", sorted(recipes_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.goals.asked() or recipe.rank is not None


def content_of(file: Path) -> dict[str, Any]:
    """Return what a file says, over what the files say that it begins with."""
    own = yaml.safe_load(file.read_text())
    before = [content_of(file.with_name(f"{name}.yaml")) for name in own.pop("defaults", []) if name != "_self_"]
    return {key: value for content in [*before, own] for key, value in content.items()}


@pytest.mark.parametrize(("family", "method"), sorted(METHODS))
def test_every_method_has_a_file_that_shows_every_field_with_its_default(family: str, method: str) -> None:
    content = content_of(configs_folder() / "stage" / family / f"{method}.yaml")
    assert (content.pop("family"), content.pop("method")) == (family, method)
    fields = config_type(family, method).model_fields
    assert set(content) == set(fields)
    for name, value in content.items():
        default = fields[name].get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            value = type(default).model_validate(value)
        assert value == (list(default) if isinstance(default, tuple) else default), name


def test_every_stage_file_belongs_to_a_method() -> None:
    for file in (configs_folder() / "stage").glob("*/[!_]*.yaml"):
        assert (file.parent.name, file.stem) in METHODS
