"""The zoo's own parts: steps that fail, rows that are kept, and the page; on toys, without any library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import cut
from mil_cli.graph.model import Model
from scripts.pool import read_rows
from scripts.zoo import __main__ as zoo
from scripts.zoo.checks import STEPS, check, in_double_precision
from scripts.zoo.sample import Sample, enliven, fresh
from scripts.zoo.table import outcome, page

TOYS = "tests.scripts.test_zoo"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.scale = nn.Parameter(torch.full((10, 1, 1), 1e-6))
        self.head = nn.Linear(10, 4)

    def forward(self, image: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.stem(image)))
        return self.head((features * self.scale).mean((2, 3)))


class ReadsValues(nn.Module):
    """Cannot be captured, by torch itself either."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


def names() -> list[str]:
    return ["good", "reads_values", "broken"]


def build(name: str) -> Sample:
    torch.manual_seed(0)
    if name == "broken":
        raise ValueError("no such weights")
    return Sample(Toy(), (torch.randn(2, 3, 8, 8),)) if name == "good" else Sample(ReadsValues(), (torch.randn(2, 3),))


def checked(name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    check(f"{TOYS}:{name}", lambda row: rows.append(json.loads(json.dumps(row))))
    return rows[-1]


def test_a_sound_model_passes_every_step() -> None:
    row = checked("good")
    assert outcome(row) == "pass", row
    assert set(row["seconds"]) == set(STEPS)
    assert row["unknown"] == []
    assert row["cuttable_share"] == pytest.approx(20 / 24, abs=1e-4)  # all but the rows of the four outputs
    assert row["inner_share"] == 1.0
    assert row["params_after"] < row["params"]
    assert row["difference"] < 1e-5


def test_double_precision_is_the_same_model() -> None:
    sample = build("good")
    enliven(sample)
    model = Model.capture(sample.module, sample.args)
    whole = in_double_precision(model)
    with torch.no_grad():
        single, double = model(*model.samples[0]), whole(*whole.samples[0])
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    assert single.dtype == torch.float32


@pytest.mark.slow
def test_a_wrong_cut_is_found_in_double_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*given: Any) -> Model:
        smaller = cut(*given)
        with torch.no_grad():
            smaller.graph.get_parameter("head.weight").mul_(1.01)
        return smaller

    monkeypatch.setattr("scripts.zoo.checks.cut", spoilt)
    assert "the outputs differ by" in checked("good")["failed"]["equivalence"]


def test_what_torch_itself_cannot_do_is_the_originals_failure() -> None:
    row = checked("reads_values")
    assert outcome(row) == "original"
    assert list(row["original"]) == ["capture"]
    assert row["failed"] == {}


def test_a_model_that_cannot_be_made_is_a_failure() -> None:
    row = checked("broken")
    assert outcome(row) == "fail"
    assert row["failed"] == {"build": "ValueError: no such weights"}


def test_nothing_constant_or_default_is_left() -> None:
    sample = build("good")
    enliven(sample)
    toy = sample.module
    assert all(float(parameter.detach().std()) > 0.01 for parameter in toy.parameters())
    with torch.no_grad():
        given = toy.stem(*sample.args)  # type: ignore[operator]
    torch.testing.assert_close(toy.norm.running_mean, given.mean((0, 2, 3)))  # type: ignore[union-attr]
    assert toy.norm.momentum == 0.1  # type: ignore[union-attr]
    assert toy.training


def test_fresh_inputs_have_the_form_of_the_old_and_other_numbers() -> None:
    call = (torch.randn(2, 3), 7), {"tokens": torch.arange(9)}
    args, kwargs = fresh(call, 1)
    assert args[0].shape == (2, 3)
    assert not torch.equal(args[0], call[0][0])
    assert args[1] == 7
    assert kwargs["tokens"].sort().values.tolist() == list(range(9))
    assert torch.equal(fresh(call, 1)[0][0], args[0])


def zoo_with(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """Run the zoo on the toys with a check that only notes which it was given; return those."""
    done: list[str] = []

    def note(job: object, name: str, **limits: object) -> dict[str, Any]:
        done.append(name.partition(":")[2])
        return {"name": name, **({"failed": {"cut": "it | broke"}} if name.endswith("broken") else {})}

    monkeypatch.setattr(zoo, "run", note)
    files = ["--rows", str(folder / "rows.jsonl"), "--out", str(folder / "page.md")]
    assert zoo.main([*files, "--catalogues", TOYS, *words]) in (0, 1)
    return done


def test_done_models_are_skipped_and_failed_ones_done_again_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zoo_with(tmp_path, monkeypatch, "--only", "good") == ["good"]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"name": "half a li')  # killed while it wrote
        file.write("\n")
    assert zoo_with(tmp_path, monkeypatch) == ["reads_values", "broken"]
    assert zoo_with(tmp_path, monkeypatch) == []
    assert zoo_with(tmp_path, monkeypatch, "--again") == ["broken"]
    assert len({row["name"] for row in read_rows(tmp_path / "rows.jsonl")}) == 3
    assert "it \\| broke" in (tmp_path / "page.md").read_text()


def test_shards_share_the_models_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = zoo_with(tmp_path, monkeypatch, "--shard", "1/2")
    second = zoo_with(tmp_path, monkeypatch, "--shard", "2/2")
    assert first == ["good", "broken"]
    assert second == ["reads_values"]
    with pytest.raises(SystemExit):
        zoo_with(tmp_path, monkeypatch, "--shard", "3/2")


def test_the_page_counts_outcomes_apart() -> None:
    figures = {"cuttable_share": 0.5, "inner_share": 1.0, "seconds": {"analyse": 2.0}, "macs": 10, "macs_after": 4}
    rows = [
        {"name": "a", **figures},
        {"name": "b", **figures, "cuttable_share": 0.9, "original": {"onnx": "torch cannot"}},
        {"name": "c", "step": "cut", "ended": "not done after 9 s"},
    ]
    text = page(rows, "torch 2", total=5)
    assert "3 models: **1 pass every step**, 1 fail one, 1 fail a step that their original fails too" in text
    assert "2 models of the list have not been run; totals say nothing" in text
    assert "50.0 % pass" in text
    assert "median 0.700, lowest 0.500" in text
    assert "| c | cut | not done after 9 s |" in text
    assert "| b | onnx | torch cannot |" in text
