"""`mil init` writes the recipe folder that also ships, and never over anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from mil_cli.cli.init import FILES
from mil_cli.cli.main import main
from mil_cli.recipe.locations import recipes_folder


def test_writes_what_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "deep" / "mine")]) == 0
    for name in FILES:
        assert (tmp_path / "deep/mine" / name).read_text() == (recipes_folder() / "own_model" / name).read_text()
    assert "mil compress" in capsys.readouterr().out


def test_ships_nothing_else() -> None:
    shipped = {path.name for path in (recipes_folder() / "own_model").iterdir() if path.name != "__pycache__"}
    assert shipped == set(FILES)


def test_never_writes_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert "model.py" in capsys.readouterr().err
    assert (tmp_path / "model.py").read_text() == "mine"
    assert not (tmp_path / "recipe.yaml").exists()
