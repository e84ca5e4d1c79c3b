"""Processes that crash, hang or want too much memory end without harm to the others."""

from __future__ import annotations

import os
import time

import pytest

from scripts.pool import Report, run
from scripts.zoo.table import outcome

GIB = 2**30


def dies(name: str, report: Report) -> None:
    report({"name": name, "step": "first"})
    if name == "killed":
        os.kill(os.getpid(), 9)
    elif name == "raises":
        raise KeyError("what was wrong")
    elif name == "hangs":
        time.sleep(60)
    elif name == "greedy":
        bytearray(8 * GIB)
    report({"name": name, "done": True})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("killed", "-9"), ("raises", "what was wrong"), ("hangs", "not done after"), ("greedy", "MemoryError")],
)
def test_a_process_that_dies_leaves_what_was_known(name: str, reason: str) -> None:
    known = run(dies, name, timeout=5 if name == "hangs" else 60, memory=4 * GIB)
    assert known["step"] == "first"
    assert reason in known["ended"]
    assert outcome(known) == "fail"


def test_a_process_that_ends_well_gives_its_last_report() -> None:
    assert run(dies, "well", timeout=60, memory=4 * GIB) == {"name": "well", "done": True}
