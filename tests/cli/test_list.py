"""`mil list`: what is shipped, each with the first words of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mil_cli.cli.list import Kind, describe, entries
from mil_cli.cli.main import main
from mil_cli.recipe.locations import configs_folder, recipes_folder
from mil_cli.stages.registry import config_type


@pytest.mark.parametrize("kind", list(Kind))
def test_everything_has_a_description(kind: Kind) -> None:
    found = entries(kind)
    assert found
    for name, description in found:
        assert name
        assert len(description) > 10, f"{name} has no comment that says what it is"


def test_every_recipe_says_what_it_needs_how_long_it_takes_and_the_command() -> None:
    for file in recipes_folder().rglob("*.yaml"):
        head, _, content = file.read_text(encoding="utf-8").partition("\ndefaults:")
        verb = "rank" if "\nrank:" in content else "compress"
        for word in ("# Needs:", "# Takes:", f"# Command: mil {verb}"):
            assert word in head, f"{file} does not say {word}"


def test_every_group_file_opens_with_a_comment() -> None:
    for file in configs_folder().rglob("*.yaml"):
        assert file.read_text(encoding="utf-8").startswith("#"), file


def test_description_ends_at_the_first_full_stop(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("# @package _global_\n# Does one thing\n# in two lines. More words.\n#\n# Needs: nothing\na: 1\n")
    assert describe(file) == "Does one thing in two lines"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    assert "resnet20" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert "recipes:" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, _ in entries(Kind.STAGES)])
def test_all_settings_of_a_stage_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "stages", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# ")
    content = yaml.safe_load(shown)
    kind = config_type(content.pop("family"), content.pop("method"))
    assert set(content) == set(kind.model_fields)


def test_a_name_may_be_short_and_a_wrong_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "stages", "taylor"]) == 0
    assert "normalise: true" in capsys.readouterr().out
    assert main(["list", "stages", "tailor"]) == 2
    assert "did you mean 'taylor'" in capsys.readouterr().err
    assert main(["list", "recipes", "lsq_bits"]) == 0
    assert "hydra:" in capsys.readouterr().out
