"""What goes into the report of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from mil_cli.run.runner import _stage_entry, _timed
from tests.run.toys import Scale, toy_executor, toy_model


def test_a_training_that_diverged_leaves_a_report_that_any_program_reads(tmp_path: Path) -> None:
    result = toy_executor(tmp_path).run("scale", Scale(), toy_model())
    history = [{"epoch": 1, "train_loss": 2.5}, {"epoch": 2, "train_loss": math.nan}]
    diverged = replace(result, facts={**result.facts, "notes": {"history": history, "drop": math.inf}})
    text = json.dumps(_stage_entry(diverged, None))
    notes = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["notes"]
    assert notes == {"history": [history[0], {"epoch": 2, "train_loss": None}], "drop": None}


class Rounds(Scale):
    """A stage that quantizes."""

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "rounds"


@pytest.mark.parametrize(
    ("chain", "every", "timed"),
    [
        ("q", False, ""),
        ("sq", False, "0"),
        ("ssq", False, "1"),
        ("sqs", False, "01"),
        ("sss", False, ""),
        ("sss", True, "01"),
    ],
)
def test_files_on_both_sides_of_quantization_are_timed(chain: str, every: bool, timed: str, tmp_path: Path) -> None:
    result = toy_executor(tmp_path).run("scale", Scale(), toy_model())
    results = [replace(result, config=Rounds() if letter == "q" else Scale()) for letter in chain]
    assert _timed(results, every=every) == [int(place) for place in timed]
