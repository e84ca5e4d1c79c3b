"""`mil cache`: listing and clearing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mil_cli.cli.cache import age
from mil_cli.cli.main import main
from mil_cli.events import SilentProgress
from mil_cli.run.cache import Cache


def fill(location: Path, key: str, *, days_old: float = 0.0) -> None:
    def compute(folder: Path) -> dict[str, object]:
        (folder / "model.pt2").write_bytes(b"x" * 1000)
        return {}

    entry, _ = Cache(location, SilentProgress()).memo(
        key, kind="stage", label=f"label-{key}", fresh=False, compute=compute
    )
    moment = time.time() - days_old * 86400
    os.utime(entry.folder, (moment, moment))


def test_lists_and_clears_by_age(private_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(private_cache, "new")
    fill(private_cache, "old", days_old=40)
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "label-new" in shown
    assert "40 d" in shown
    assert "2 entries" in shown
    assert main(["cache", "--clear", "--older-than", "30"]) == 0
    assert "removed 1 entries" in capsys.readouterr().out
    assert main(["cache"]) == 0
    assert "label-old" not in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 entries")


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_negative_age_is_refused(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--older-than", days]) == 2
    assert "--older-than" in capsys.readouterr().err


def test_age() -> None:
    assert [age(seconds) for seconds in (30, 600, 7200, 200_000)] == ["0 min", "10 min", "2 h", "2 d"]
