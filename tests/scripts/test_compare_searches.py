"""Searches by gradients beside random search: what is computed, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mil_cli.models.cell_nets import cell_nets
from mil_cli.spaces import CostCounter, DesignedSpace
from scripts import compare_searches
from scripts.compare_searches import _drawn, _mixture_macs, main
from scripts.pool import append_row, read_rows
from tests.scripts.planned import planned_points

RECIPE = Path(__file__).parents[2] / "recipes" / "nas" / "darts_cell.yaml"
TINY = [
    "model.stem_stride=1",
    "model.widths=[4,8]",
    "stages.darts.trainer.epochs=1",
    "stages.tune.trainer.epochs=1",
    "trainer.epochs=1",
]


def test_the_mixture_costs_what_its_operators_cost_together() -> None:
    space = DesignedSpace(cell_nets(widths=(4, 8), nodes=1))
    counter = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    each = {name: counter.macs(space.architecture({"edges.0": name})) for name in ("none", "conv", "separable")}
    expected = each["conv"] + each["separable"] - each["none"]
    assert _mixture_macs(space, (torch.zeros(1, 1, 28, 28),)) == expected


def test_what_is_drawn_has_the_form_of_what_is_found() -> None:
    space, generator = DesignedSpace(cell_nets()), torch.Generator().manual_seed(0)
    drawn = [_drawn(space, 2, generator) for _ in range(30)]
    assert {sum(choice == "none" for choice in one.values()) for one in drawn} == {1}  # 1 + 2 + 2 of 6 edges are kept
    assert {choice for one in drawn for choice in one.values()} == {"none", "skip", "conv", "separable", "mean", "max"}


@pytest.mark.slow
def test_the_page_tells_errors_and_what_was_trained_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.md"
    words = [str(RECIPE), "--out", str(out), "--seeds", "0", "1", "--methods", "random", "darts", "--known-only"]
    points = planned_points(compare_searches, words, monkeypatch)
    found = {"random": (0.9, 0.8, 5), "darts": (0.9, 0.9, 1)}
    for point in points:
        *qualities, tried = found[point["method"]]
        result = {"quality": qualities[point["seed"]], "macs": 1000 * (1 + point["seed"]), "tried": tried}
        environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
        append_row(out.with_suffix(".jsonl"), {"point": point, "result": result, "environment": environment})
    assert main(words) == 0
    text = out.read_text()
    assert "| `random` | 15.00 % |" in text
    # Errors are 10 and 10 % against 10 and 20 %: the differences 0 and -10 have the mean -5 and half-width 63.53.
    assert "| `darts` | **10.00 %** (-68.53 to +58.53) |" in text
    assert "| `random` | 1,500 | 5.0 |" in text


@pytest.mark.slow
def test_all_searches_give_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIL_CACHE", str(tmp_path / "cache"))
    recipe, out = tmp_path / "digits.yaml", tmp_path / "page.md"
    text = RECIPE.read_text(encoding="utf-8").replace("/data: fashion_mnist", "/data: digits")
    recipe.write_text(text.replace("data: {train_samples: 20000}\n", ""), encoding="utf-8")
    assert main([str(recipe), "--out", str(out), "--seeds", "0", "--epochs", "1", "--set", *TINY]) == 0
    rows = {row["point"]["method"]: row["result"] for row in read_rows(out.with_suffix(".jsonl"))}
    assert set(rows) == {"random", "darts", "fair", "pc_darts"}
    assert rows["random"]["tried"] > 1
    assert all(row["macs"] > 0 for row in rows.values())
