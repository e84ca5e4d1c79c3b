"""`mil rank` on a small space of a user's own: the ranking, what is kept of it, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mil_cli.assess.active import next_trainings
from mil_cli.assess.columns import Columns
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.table import read_table
from mil_cli.cli.main import main
from mil_cli.recipe.rank import SpaceRanking
from mil_cli.run import parts
from mil_cli.run.parts import Job, Result

MODEL = """\
from torch import nn
from mil_cli.spaces import Choice, Conv2d, Linear, Width

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = width = Width([2, 4, 8, 16])
        self.stem = Conv2d(1, width, 3)
        self.block = Choice({"conv": Conv2d(width, width, 3, padding=1), "skip": nn.Identity()})
        self.head = Linear(width, 10)

    def forward(self, image):
        return self.head(self.block(self.stem(image).relu()).relu().mean((2, 3)))
"""

RECIPE = """\
defaults:
  - /mil/defaults
  - /data: digits
  - /task: classification
  - /device: host_cpu
  - _self_
model: {_target_: net.Net}
seed: 1
data: {val_samples: 270, test_samples: 1271}  # leaves 256 to train on
trainer: {epochs: 2, batch_size: 64}
rank:
  architectures: 7
  scores: [naswot]
  partial: {epochs: 1, samples: 128}
  train: 6
  start: 4
  predictor: ridge
  next: {batch: 2}
  refits: 2
  repeats: 1
  draws: 100
"""


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a recipe with a space beside it, go into its folder, and return the recipe."""
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    recipe = tmp_path / "nets.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return recipe


def ranking(folder: Path) -> dict[str, Any]:
    """Return a ranking without what differs between equal ones: seconds, and how it was asked for."""
    found: dict[str, Any] = json.loads((folder / "ranking.json").read_text())
    return {key: value for key, value in found.items() if key not in ("costs", "recipe")}


def interrupted_after(jobs: int) -> Callable[..., list[Result]]:
    """Return a `compute` that is interrupted in the middle."""
    done: list[Job] = []
    compute = parts.compute

    def computing(recipe: Any, job: Job, **options: Any) -> list[Result]:
        if len(done) == jobs:
            raise KeyboardInterrupt
        done.append(job)
        return compute(recipe, job, **options)

    return computing


@pytest.mark.slow
def test_an_interrupted_ranking_goes_on_and_is_complete(
    space: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for jobs in (3, 8):  # among the partial trainings, and among the whole ones
        monkeypatch.setattr(parts, "compute", interrupted_after(jobs))
        assert main(["rank", str(space)]) == 130
        monkeypatch.undo()
        monkeypatch.chdir(space.parent)
        monkeypatch.setenv("MIL_CACHE", str(space.parent / "mil-cache"))
    computed: list[Job] = []
    compute = parts.compute
    monkeypatch.setattr(parts, "compute", lambda recipe, job, **_: computed.append(job) or compute(recipe, job))
    assert main(["rank", str(space), "--json", "copy.json"]) == 0
    assert len(computed) == 7 + 6 - 3 - 8
    (run,) = (folder for folder in (space.parent / "runs/nets").iterdir() if not folder.is_symlink())
    found = ranking(run)
    assert ranking(run.parent / "latest") == found
    assert json.loads(Path("copy.json").read_text()) == json.loads((run / "ranking.json").read_text())
    output = capsys.readouterr().out
    best = found["architectures"][0]["id"]
    assert f"{best} is width={found['choices'][best]['width']} block={found['choices'][best]['block']}" in output
    assert "val alone: tau" in output
    assert str(Path("runs/nets") / run.name / "architectures.csv") in output

    for shown in ("runs/nets/latest/ranking.json", f"runs/nets/{run.name}"):
        assert main(["report", shown]) == 0
    assert capsys.readouterr().out.endswith(output)

    monkeypatch.setattr(parts, "compute", interrupted_after(0))
    assert main(["rank", str(space), "--out", "again"]) == 0  # all is known
    assert ranking(Path("again")) == found
    check_choice(run)
    check_costs(run)
    check_fed_back(run)


def check_choice(run: Path) -> None:
    """Check that those trained last are what `next_trainings` chooses after the first four."""
    table = read_table(run / "architectures.csv", Columns.model_validate_json((run / "columns.json").read_text()))
    macs = table.inputs[:, table.columns.numeric.index("macs")]
    first = macs.argsort(kind="stable")[[0, 2, 4, 6]]  # from the cheapest to the dearest of seven
    assert table.trained[first].all()
    seen = table.quality.copy()
    seen[[row for row in range(7) if row not in first]] = math.nan
    acquisition = SpaceRanking(next={"batch": 2}).next
    chosen = next_trainings(Ridge(), table.inputs, seen, acquisition, seed=1 + 4)
    assert sorted(chosen) == [row for row in range(7) if table.trained[row] and row not in first]


def check_costs(run: Path) -> None:
    with (run / "architectures.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    costs = json.loads((run / "ranking.json").read_text())["costs"]
    for part in ("scores", "partial", "training"):
        spent = [float(row[f"{part}_cpu_seconds"]) for row in rows if row[f"{part}_cpu_seconds"]]
        assert costs[part]["architectures"] == len(spent) == (6 if part == "training" else 7)
        assert costs[part]["cpu"] == pytest.approx(math.fsum(spent))
        assert min(spent) > 0
    assert costs["cpu_of_training_all"] == pytest.approx(costs["training"]["cpu"] * 7 / 6)


def check_fed_back(run: Path) -> None:
    settings = "{table: %s/architectures.csv, columns: %s/columns.json, predictor: ridge, next: {batch: 2}"
    text = f"seed: 1\nrank: {settings % (run, run)}, refits: 2, repeats: 1, draws: 100}}\n"
    Path("table.yaml").write_text(text, encoding="utf-8")
    assert main(["rank", "table.yaml", "--out", "fed"]) == 0
    names = ("architectures", "tau", "tau_of_single_columns", "train_next")
    before, after = ranking(run), ranking(Path("fed"))
    assert [before[name] for name in names] == [after[name] for name in names]
    assert (Path("fed") / "architectures.csv").read_text() == (run / "architectures.csv").read_text()


def test_a_collapse_of_all_trainings_is_told_at_once(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("rank.scores=[]", "rank.partial=null", "trainer.epochs=1")
    assert main(["rank", str(space), *alone, "trainer.learning_rate=1e30"]) == 2
    assert "trainer: all 4 trainings collapsed" in capsys.readouterr().err


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no rank": (("rank=null",), ("rank: the recipe does not say what is ranked", "architectures: 60")),
    "too few trainings": (("rank.train=3",), ("rank.train", "greater than or equal to 4")),
    "more trainings than architectures": (("rank.train=9",), ("9 trainings of 7", "set train")),
    "more first ones than trainings": (("rank.start=7",), ("7 of 6 trainings", "set start")),
    "unknown score": (("rank.scores=[naswt]",), ("rank.scores", "did you mean 'naswot'?")),
    "size as score": (("rank.scores=[macs]",), ("has macs already", "leave it out")),
    "unknown predictor": (("rank.predictor=rige",), ("rank.predictor.method", "did you mean 'ridge'?")),
    "unknown key": (("+rank.tran=3",), ("rank.tran", "did you mean 'train'?")),
    "unknown trainer key": (("+rank.partial.trainer={epoch: 1}",), ("rank.partial.trainer.epoch", "did you mean")),
    "epochs twice": (("+rank.partial.trainer={epochs: 1}",), ("rank.partial", "write epochs: there")),
    "fewer samples than a batch": (("rank.partial.samples=63",), ("rank.partial.samples", "at least 64")),
    "images too small": (
        ("+rank.partial.resolution=0.2",),
        ("rank.partial.resolution: the model cannot be trained on images of 2 x 2", "a larger share"),
    ),
    "larger images": (("+rank.partial.resolution=2",), ("rank.partial.resolution", "less than or equal to 1")),
    "no whole curves": (("trainer.evaluate_every=2",), ("trainer.evaluate_every", "whole curves")),
    "range upside down": (("+rank.macs=[2k, 1k]",), ("rank.macs", "the smaller number first")),
    "range with too few": (
        ("+rank.macs=[1k, 1.1k]",),
        ("rank.macs: 0 different architectures of 1,000 to", "widen"),
    ),
    "space with too few": (("rank.architectures=9",), ("rank.architectures: 8 different", "at most 8")),
    "no choices": (
        ("model={_target_: mil_cli.models.convnet.convnet}",),
        ("nothing to choose from", "mil_cli.spaces", "nas/elastic"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_ranked_is_refused(case: str, space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = REFUSED[case]
    assert main(["rank", str(space), *overrides]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("error:") == 1
    assert "  -> " in message
    for words in expected:
        assert words in message, message


TABLE = {
    "no file": ("a: 1", "{table: no.csv, columns: {features: [a]}}", ["no.csv", "cannot read the table"]),
    "no column": ("id,b,quality", "{table: t.csv, columns: {features: [a]}}", ["t.csv:1", "no column 'a'"]),
    "no columns": ("id,b,quality", "{table: t.csv}", ["rank.columns", "a value is needed"]),
    "no file of columns": ("id", "{table: t.csv, columns: c.json}", ["rank.columns", "c.json"]),
    "few": ("id,a,quality\nx,1,2", "{table: t.csv, columns: {features: [a]}}", ["too few architectures are trained"]),
    "misspelt": ("id", "{table: t.csv, columns: {feature: [a]}}", ["rank.columns.feature", "did you mean 'features'?"]),
}


@pytest.mark.parametrize("case", TABLE)
def test_tables_that_cannot_be_ranked_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, section, expected = TABLE[case]
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(table, encoding="utf-8")
    Path("ranked.yaml").write_text(f"rank: {section}\n", encoding="utf-8")
    assert main(["rank", "ranked.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    for words in expected:
        assert words in message, message


def test_a_recipe_that_only_ranks_is_not_compressed(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for plan in ([], ["--plan"]):
        assert main(["compress", str(space), *plan]) == 2
        assert "nothing to compress: the chain is empty" in capsys.readouterr().err
    Path("ranked.yaml").write_text("rank: {table: t.csv, columns: {features: [a]}}\n", encoding="utf-8")
    assert main(["compress", "ranked.yaml"]) == 2
    assert "mil rank" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_beside_each_other_give_the_same_ranking(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["rank", str(space), "--out", "serial"]) == 0
    monkeypatch.setenv("MIL_CACHE", str(space.parent / "other-cache"))
    assert main(["rank", str(space), "rank.jobs=2", "--out", "parallel"]) == 0
    assert ranking(Path("parallel")) == ranking(Path("serial"))


@pytest.mark.slow
def test_a_killed_ranking_goes_on_to_the_same(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["rank", str(space), "--out", "whole"]) == 0
    cache = space.parent / "other-cache"
    command = [sys.executable, "-m", "mil_cli", "rank", str(space), "rank.jobs=2", "--out", "killed"]
    for known in (1, 9):
        process = subprocess.Popen(command, env={**os.environ, "MIL_CACHE": str(cache)})
        while len(list(cache.glob("entries/*"))) < known and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    monkeypatch.setenv("MIL_CACHE", str(cache))
    assert main(["rank", str(space), "--out", "killed"]) == 0
    assert ranking(Path("killed")) == ranking(Path("whole"))
