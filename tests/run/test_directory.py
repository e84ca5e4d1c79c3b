"""The run directory: names, going on after a kill, the link to the latest, and what is in the way."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from mil_cli.errors import OutputError
from mil_cli.run.directory import PAGE, RANKING, REPORT, RunDirectory

NOW = datetime(2024, 5, 6, 7, 8, 9)


def open_directory(base: Path, *, resolved: str = "a: 1\n", out: Path | None = None) -> RunDirectory:
    return RunDirectory.open(recipe_name="demo", resolved=resolved, out=out, now=NOW, base=base)


def test_a_run_that_ended_without_a_report_is_taken_up_again(tmp_path: Path) -> None:
    first = open_directory(tmp_path)
    (first.path / ".writing-123").write_text("half")
    first.close()  # as a kill does
    again = open_directory(tmp_path)
    assert again.path == first.path == tmp_path / "runs" / "demo" / "2024-05-06_07-08-09"
    assert not (again.path / ".writing-123").exists()
    (again.path / REPORT).write_text("{}")
    again.close()
    other = open_directory(tmp_path)
    assert other.path != first.path


def test_a_changed_recipe_and_a_living_run_get_their_own_folder(tmp_path: Path) -> None:
    living = open_directory(tmp_path)
    beside = open_directory(tmp_path)
    changed = open_directory(tmp_path, resolved="a: 2\n")
    assert len({living.path, beside.path, changed.path}) == 3


def test_latest_points_to_the_last(tmp_path: Path) -> None:
    for _ in range(2):
        directory = open_directory(tmp_path)
        (directory.path / REPORT).write_text("{}")
        directory.point_latest()
        directory.close()
    latest = tmp_path / "runs" / "demo" / "latest"
    assert latest.resolve() == directory.path
    assert sorted(path.name for path in latest.parent.iterdir())[-1] == "latest"


def test_a_chosen_folder_is_used_as_it_is_and_one_run_at_a_time(tmp_path: Path) -> None:
    directory = open_directory(tmp_path, out=tmp_path / "mine")
    assert directory.path == tmp_path / "mine"
    with pytest.raises(OutputError, match="another run"):
        open_directory(tmp_path, out=tmp_path / "mine")


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    for name in (REPORT, RANKING, PAGE, "notes.txt"):
        (out / name).write_text("{}")
    open_directory(tmp_path, out=out).close()
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "recipe.yaml"]


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        open_directory(tmp_path, out=tmp_path / "mine")
