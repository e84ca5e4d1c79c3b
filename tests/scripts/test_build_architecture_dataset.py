"""The data set of architectures: what is drawn, what rows hold, what is left of an interrupted script."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.table import read_table
from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.models.small_nets import small_nets
from mil_cli.recipe.load import load_recipe
from mil_cli.run import architectures
from mil_cli.run.environment import computing_environment
from mil_cli.spaces import CostCounter, DesignedSpace
from scripts import build_architecture_dataset
from scripts.architecture_points import SCORES, train_point
from scripts.architecture_table import table
from scripts.build_architecture_dataset import main
from scripts.comparison import Point, Result
from scripts.pool import append_row, read_rows

WIDTHS, BLOCKS = [[2, 4], [4, 8], [4, 8]], [1, 1, 1]
RECIPE = f"""\
defaults:
  - /mil/defaults
  - /data: digits
  - /task: classification
  - /device: host_cpu
  - /stage/train@stages.train: supervised
  - _self_
chain: [train]
model: {{_target_: mil_cli.models.small_nets.small_nets, widths: {WIDTHS}, blocks: {BLOCKS}}}
trainer: {{epochs: 2, batch_size: 128}}
"""
LOW, HIGH = 1500, 6500


def words(folder: Path, *more: str) -> list[str]:
    """Return the command line for three small architectures, one of them with two seeds."""
    file = folder / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    spread = ["--architectures", "3", "--repeated", "1", "--seeds", "2", "--macs", str(LOW), str(HIGH)]
    return [str(file), "--out", str(folder / "table.csv"), *spread, *more]


def in_this_process(
    work: Callable[[Point], Result], phases: Sequence[Sequence[Point]], kept: Path, limits: object, shown: object
) -> list[str]:
    """Compute points as `compute` does, without its processes, which take seconds to start."""
    for point in phases[0]:
        append_row(kept, {"point": point, "result": work(point), "environment": computing_environment()})
    return []


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(one) for key, one in value.items() if "seconds" not in key}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_trainings_are_fixed_before_the_first_and_come_in_the_order_of_their_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[str, int]]] = []
    drawn: dict[str, dict[str, Any]] = {}

    def note(work: Any, phases: list[list[Point]], *rest: object, **options: object) -> list[str]:
        asked.append([(point["architecture"], point["seed"]) for point in phases[0]])
        drawn.update(work.args[1])
        return []

    monkeypatch.setattr(build_architecture_dataset, "compute", note)
    settings = ["--architectures", "16", "--repeated", "5", "--seeds", "3"]
    for more in ((), ("--shard", "1/2"), ("--shard", "2/2"), ("--limit", "7")):
        assert main(words(tmp_path, *settings, *more)) == 1  # since nothing is known
    everything, first, second, limited = asked
    names = [name for name, _ in everything[:16]]
    assert everything == [(name, 0) for name in names] + [(name, seed) for seed in (1, 2) for name in names[:5]]
    assert sorted(first + second) == sorted(everything)
    assert limited == everything[:7]

    space = DesignedSpace(small_nets(widths=WIDTHS, blocks=BLOCKS))
    architectures = [space.architecture(drawn[name]) for name in names]
    assert len(space.unique(architectures)) == 16
    costs = CostCounter(space, (torch.zeros(1, 1, 8, 8),))
    strata = [math.log(costs.macs(one) / LOW) / math.log(HIGH / LOW) * 8 for one in architectures]
    assert sorted(map(math.floor, strata)) == [stratum for stratum in range(8) for _ in range(2)]
    assert strata != sorted(strata)


@pytest.mark.slow
def test_rows_are_complete_and_the_same_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_architecture_dataset, "compute", in_this_process)
    out, kept = tmp_path / "table.csv", tmp_path / "table.jsonl"
    assert main(words(tmp_path)) == 0
    whole, rows = out.read_text(), read(out)
    assert [row["seed"] for row in rows] == ["0", "0", "0", "1"]
    assert rows[3]["id"] == rows[0]["id"]
    space = DesignedSpace(small_nets(widths=WIDTHS, blocks=BLOCKS))
    costs = CostCounter(space, (torch.zeros(1, 1, 8, 8),))
    for row, kept_row in zip(rows, read_rows(kept), strict=True):
        choices = kept_row["result"]["choices"]
        architecture = space.architecture(choices)
        expected = {one.name: str(choices.get(one.name, "")) for one in space.decisions}
        assert {name: row[name] for name in expected} == expected
        assert [int(row["macs"]), int(row["params"])] == [costs.macs(architecture), costs.params(architecture)]
        assert row["quality"] == row["val_2"]
        assert [bool(row[score]) for score in SCORES] == [row["seed"] == "0"] * len(SCORES)
        for part in ("training_cpu_seconds", "validation_wall_seconds"):
            assert float(row[part]) == pytest.approx(float(row[f"{part}_1"]) + float(row[f"{part}_2"]), rel=1e-4)
            assert float(row[f"{part}_2"]) > 0
        assert float(row["train_loss_2"]) < float(row["train_loss_1"])
    check_reading(out, rows, tuple(one.name for one in space.decisions))
    text = out.with_suffix(".md").read_text()
    assert "4 trainings, of 3 architectures." in text
    assert "(architectures with several: 1)" in text

    *first, last = kept.read_text().splitlines()
    kept.write_text("\n".join([*first, last[:100]]))  # killed while it wrote
    rows_of_other_code = [{**row, "point": {**row["point"], "of": "other"}} for row in read_rows(kept)]
    other = tmp_path / "other.jsonl"
    for row in rows_of_other_code:
        append_row(other, row)
    joined = ("--known-only", "--out", str(other.with_suffix(".csv")))
    assert main(words(tmp_path, *joined)) == 1
    assert main(words(tmp_path, *joined, "--trust-rows")) == 0
    assert read(other.with_suffix(".csv")) == rows[:3]
    assert main(words(tmp_path, "--known-only")) == 0
    assert "3 of 4 trainings, of 3 architectures." in out.with_suffix(".md").read_text()
    assert main(words(tmp_path)) == 0
    seconds = [name for name in rows[0] if "seconds" in name]
    for before, after in zip(rows, read(out), strict=True):
        assert {**before, **dict.fromkeys(seconds)} == {**after, **dict.fromkeys(seconds)}
    assert out.read_text().splitlines()[:4] == whole.splitlines()[:4]  # those that were kept, seconds included


def check_reading(file: Path, rows: list[dict[str, str]], decisions: tuple[str, ...]) -> None:
    """Check that predictors read the table: seeds are merged, what was spent is added, scores are those of one seed."""
    seconds = Seconds(training=("training_cpu_seconds", "validation_cpu_seconds"))
    columns = Columns(features=("macs",), categories=decisions, scores=SCORES, partial=("val_1",), cpu_seconds=seconds)
    found = read_table(file, columns)
    assert found.ids == tuple(row["id"] for row in rows[:3])
    same = [rows[0], rows[3]]
    assert found.quality[0] == pytest.approx(sum(float(row["quality"]) for row in same) / 2)
    spent = [float(row[name]) for row in same for name in seconds.training]
    assert found.spent("training", "cpu")[0] == pytest.approx(sum(spent))
    score = found.columns.numeric.index("naswot")
    assert found.inputs[0, score] == float(rows[0]["naswot"])


@pytest.mark.slow
def test_the_test_split_gives_test_quality_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(words(tmp_path)[0])
    recipe = load_recipe(file)
    space = DesignedSpace(small_nets(widths=WIDTHS, blocks=BLOCKS))
    drawn, point = {"one": space.largest.to_json()}, {"architecture": "one", "seed": 0}
    result = train_point(recipe, drawn, point)

    def other_test(*_: object, **__: object) -> Data:
        data = digits()
        return replace(data, test=data.val)

    monkeypatch.setattr(architectures, "build_data", other_test)
    other = train_point(recipe, drawn, point)
    assert other["test_quality"] == other["quality"] != result["test_quality"]
    assert without_seconds({**other, "test_quality": result["test_quality"]}) == without_seconds(result)


def test_a_training_that_collapsed_is_a_row(tmp_path: Path) -> None:
    recipe = load_recipe(Path(words(tmp_path)[0]), ["trainer.learning_rate=1e30"])
    space = DesignedSpace(small_nets(widths=WIDTHS, blocks=BLOCKS))
    point = {"architecture": "one", "seed": 1}
    result = json.loads(json.dumps(train_point(recipe, {"one": space.smallest.to_json()}, point)))
    assert result["quality"] is None
    names, cells = csv.reader(table([(point, result)], ["widths.0"], 2).splitlines())
    row = dict(zip(names, cells, strict=True))
    assert (row["quality"], row["test_quality"], row["val_1"], row["val_2"]) == ("nan", "nan", "", "")
    assert float(row["training_cpu_seconds"]) > 0


def test_trainings_without_whole_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="whole curves"):
        main(words(tmp_path, "--set", "trainer.early_stopping=1"))


@pytest.mark.slow
def test_a_killed_script_goes_on_and_gives_the_same_rows(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    command = [sys.executable, "-m", "scripts.build_architecture_dataset"]
    root = Path(__file__).parents[2]
    subprocess.run([*command, *words(whole)], cwd=root, check=True)
    process = subprocess.Popen([*command, *words(killed)], cwd=root, start_new_session=True)
    kept = killed / "table.jsonl"
    deadline = time.monotonic() + 600
    while not read_rows(kept) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(read_rows(kept)) < 4
    subprocess.run([*command, *words(killed), "--jobs", "2"], cwd=root, check=True)
    seconds = [name for name in read(whole / "table.csv")[0] if "seconds" in name]
    for one, other in zip(read(whole / "table.csv"), read(killed / "table.csv"), strict=True):
        assert {**one, **dict.fromkeys(seconds)} == {**other, **dict.fromkeys(seconds)}
