"""Which points a comparison would compute, without computing any."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest

from scripts.comparison import Point


def planned_points(script: ModuleType, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Return the points of all phases, in order.

    Args:
        script: The module of the comparison.
        words: Its command line.
        monkeypatch: Undone before this returns.
    """
    points: list[Point] = []

    def note(arguments: object, work: object, phases: list[list[Point]], page: object) -> int:
        points.extend(point for phase in phases for point in phase)
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(script, "carry_out", note)
        script.main(words)
    return points
