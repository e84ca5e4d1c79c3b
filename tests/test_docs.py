"""The pages in docs/ say what the program has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mil_cli.assess.scores.registry import MEASURES
from mil_cli.stages.registry import METHODS

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("method", sorted(method for family, method in METHODS if family == "prune"))
def test_the_page_on_pruning_names_every_method(method: str) -> None:
    assert f"`{method}`" in (DOCS / "pruning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", sorted(method for family, method in METHODS if family == "distill"))
def test_the_page_on_distillation_has_a_section_on_every_method(method: str) -> None:
    assert f"\n### `{method}`\n" in (DOCS / "distillation.md").read_text(encoding="utf-8")


def test_the_example_on_search_spaces_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "search_spaces.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "search_spaces.md", "exec"), names)
    assert "different nets in" in capsys.readouterr().out
    assert len(names["spread"]) == 8  # type: ignore[arg-type]


def test_the_example_on_predictors_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (DOCS / "assessment.md").read_text(encoding="utf-8").partition("\n## Predictors\n")[2]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    rows = [
        "arch,depth,width,op,synflow,naswot,losses_of_3_epochs,accuracy,score_seconds,partial_seconds,train_seconds"
    ]
    rows += [
        f"net{row},{row % 5},{8 * (row % 7)},{'ab'[row % 2]},1e{row},{row},,{row / 30 if row < 20 else ''},1,,60"
        for row in range(30)
    ]
    (tmp_path / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "assessment.md", "exec"), {})
    assert "train next: net" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_the_page_on_assessment_names_every_score(name: str) -> None:
    assert f"`{name}`" in (DOCS / "assessment.md").read_text(encoding="utf-8")
