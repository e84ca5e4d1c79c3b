"""Calls in several workers: in order or not, and what becomes of a worker that is killed."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from mil_cli.errors import MilError
from mil_cli.workers import workers


def _threads_and_double(number: int) -> tuple[int, int]:
    return torch.get_num_threads(), 2 * number


def _die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_order_from_workers_with_the_threads_asked_for() -> None:
    with workers(2, threads=1, where="jobs") as call_all:
        found = [list(call_all(_threads_and_double, [(n,) for n in numbers])) for numbers in (range(5), range(5, 7))]
    assert found == [[(1, 2 * n) for n in range(5)], [(1, 10), (1, 12)]]


def test_without_order_nothing_is_lost() -> None:
    with workers(2, threads=1, where="jobs", ordered=False) as call_all:
        assert sorted(double for _, double in call_all(_threads_and_double, [(n,) for n in range(4)])) == [0, 2, 4, 6]


def test_one_worker_is_this_process() -> None:
    with workers(1, threads=1, where="jobs") as call_all:
        assert list(call_all(os.getpid, [(), ()])) == [os.getpid()] * 2


def test_a_worker_that_is_killed_is_told() -> None:
    with (
        pytest.raises(MilError, match="ended from outside") as caught,
        workers(2, threads=1, where="rank.jobs") as call_all,
    ):
        list(call_all(_die, [(n,) for n in range(4)]))
    assert caught.value.where == "rank.jobs"
