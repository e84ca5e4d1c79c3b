from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mil_cli.errors import OutputError
from mil_cli.report.load import load_report

Make = Callable[..., dict[str, Any]]


def test_a_report_is_read_from_its_file_or_folder(tmp_path: Path, make_report: Make) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(make_report()), encoding="utf-8")
    assert load_report(tmp_path) == load_report(file) == make_report()


@pytest.mark.parametrize(
    ("content", "words", "step"),
    [
        (None, "no report here", "run the same command again"),
        ("{", "cannot be read", "run the recipe again"),
        ("[]", "not a mapping", "run the recipe again"),
        ("{}", "another version", "run the recipe again"),
        ('{"version": 2}', "another version", "newer mil"),
        ('{"version": 1}', "no proper 'recipe'", "run the recipe again"),
    ],
)
def test_what_cannot_be_shown_is_explained(tmp_path: Path, content: str | None, words: str, step: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match=words) as caught:
        load_report(tmp_path)
    assert step in str(caught.value.hint)


def test_a_damaged_part_is_named(tmp_path: Path, make_report: Make) -> None:
    (tmp_path / "report.json").write_text(json.dumps(make_report(goals={})), encoding="utf-8")
    with pytest.raises(OutputError, match="no proper 'goals'"):
        load_report(tmp_path)
