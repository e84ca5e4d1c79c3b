"""Nets of a supernet beside the same trained alone: which nets, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mil_cli.models.slimmable_resnet import slimmable_resnet
from mil_cli.spaces import CostCounter, DesignedSpace
from scripts import compare_supernet
from scripts.compare_supernet import _drawn, main
from scripts.pool import append_row, read_rows
from tests.scripts.planned import planned_points

RECIPE = Path(__file__).parents[2] / "recipes" / "nas" / "bignas_fashion.yaml"


def test_nets_are_drawn_over_the_whole_range() -> None:
    space = DesignedSpace(slimmable_resnet())
    counter = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    costs = [counter.macs(one) for one in _drawn(space, counter, 5)]
    assert costs == sorted(costs)
    assert len(set(costs)) == 5
    assert (costs[0], costs[-1]) == (counter.macs(space.smallest), counter.macs(space.largest))
    assert costs[-1] > 10 * costs[0]


def test_the_page_tells_drops_and_their_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.md"
    words = [str(RECIPE), "--out", str(out), "--seeds", "0", "1", "--count", "3", "--known-only"]
    points = planned_points(compare_supernet, words, monkeypatch)
    for point in points:
        seed = point["seed"]
        alone = {"quality": (0.8, 0.9)[seed], "macs": 1000, "params": 50, "net": "a"}
        shared = {"quality": [(0.72, 0.9)[seed], 0.5, 0.5]}
        environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
        result = shared if point["method"] == "shared" else alone
        if point.get("net", 0) == 0:
            append_row(out.with_suffix(".jsonl"), {"point": point, "result": result, "environment": environment})
    assert main(words) == 0
    text = out.read_text()
    # Drops of 10 and 0 %: the mean 5 has the half-width 12.706 * 7.071 / 2 ** 0.5.
    assert "| 1,000 | 50 | 81.00 | 85.00 | +5.00 % (-58.53 to +68.53) | 2 |" in text
    assert "| - | - | 50.00 | - | - | 0 |" in text


def test_nets_that_were_trained_alone_only_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.md"
    words = [str(RECIPE), "--out", str(out), "--seeds", "0", "--count", "3", "--known-only", "--methods", "alone"]
    points = planned_points(compare_supernet, words, monkeypatch)
    assert len(points) == 3
    result = {"quality": 0.8, "macs": 1000, "params": 50, "net": "a"}
    environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
    append_row(out.with_suffix(".jsonl"), {"point": points[0], "result": result, "environment": environment})
    assert main(words) == 0
    assert "| 1,000 | 50 | - | 80.00 | - | 0 |" in out.read_text()


@pytest.mark.slow
def test_all_of_it_for_a_moment(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    short = ["data.train_samples=256", "trainer.epochs=1"]
    assert main([str(RECIPE), "--out", str(out), "--seeds", "0", "--count", "3", "--set", *short]) == 0
    rows = [row["result"] for row in read_rows(out.with_suffix(".jsonl"))]
    assert [len(row["quality"]) for row in rows if isinstance(row["quality"], list)] == [3]
    assert sum("macs" in row for row in rows) == 3
