"""Folders of sweeps: each has its own, also when two begin in the same second."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mil_cli.cli import sweep
from mil_cli.cli.main import main
from mil_cli.cli.sweep import new_directory


def test_sweeps_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.time, "strftime", lambda form: "sweep_now")
    found: list[Path] = []
    together = threading.Barrier(8)

    def begin() -> None:
        together.wait()
        found.append(new_directory(tmp_path / "runs" / "recipe"))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8
    assert {folder.name for folder in found} == {"sweep_now", *(f"sweep_now_{number}" for number in range(1, 8))}


def test_points_of_another_sweep_in_the_folder_are_refused(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = project() / "sweep" / "2" / "point.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"overrides": [], "exit_code": 1, "message": ""}')
    assert main(["compress", "recipe.yaml", "-m", "seed=1,2", "--out", "sweep"]) == 2
    assert "points of another sweep (got '2')" in capsys.readouterr().err
    assert sorted(folder.name for folder in other.parent.parent.iterdir()) == ["2"]
