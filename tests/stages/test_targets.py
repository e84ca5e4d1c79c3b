"""Targets of stages that make a model smaller: what they come to, and what is told where they ask for nothing."""

from __future__ import annotations

import pytest

from mil_cli.events import SilentProgress
from mil_cli.stages.targets import resolve_target
from mil_cli.units import parse_kept


class Notices(SilentProgress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def notice(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    ("asked", "target", "told"),
    [
        ("6M", 6e6, ["prune: its input has 5,000,000 macs, which the target 6,000,000 allows: nothing is cut"]),
        ("4M", 4e6, []),
        ("30%", 1.5e6, []),
        (1.0, 5e6, []),
    ],
)
def test_a_count_that_the_model_does_not_reach_is_told(asked: str | float, target: float, told: list[str]) -> None:
    progress = Notices()
    found = resolve_target(parse_kept(asked), 5e6, stage="prune", quantity="macs", progress=progress)
    assert found == pytest.approx(target)
    assert progress.told == told
