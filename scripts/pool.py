"""Runs a job in a process of its own, which may crash, hang or run out of memory; keeps what came of it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_LAST_WORDS = 300
"""Characters of what a process that died had printed last."""

Known = dict[str, Any]
Report = Callable[[Known], None]
Job = Callable[[str, Report], None]


def run(job: Job, name: str, *, timeout: float, memory: int | None, preload: Sequence[str] = ()) -> Known:
    """Do a job in a fresh process; return what it reported last, with why it ended if it did not end well.

    Args:
        job: Called with the name and a function that takes what is known so far. A function of a module.
        name: The job's name.
        timeout: Seconds after which the process is ended.
        memory: Bytes of data that the process may have; None: no bound.
        preload: Modules that every process finds imported.

    Returns:
        The last report; under ``ended`` why the process ended early, absent if it did not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiving, sending = context.Pipe(duplex=False)
    with TemporaryDirectory(prefix="pool-") as folder:
        printed = Path(folder) / "printed"
        process = context.Process(target=_child, args=(job, name, sending, printed, memory))
        process.start()
        sending.close()
        try:
            known, late = _listen(receiving, time.monotonic() + timeout)
            if late:
                return {**known, "ended": f"not done after {timeout:g} s"}
            process.join()
        finally:
            if process.is_alive():
                process.kill()
                process.join()
        if process.exitcode:
            said = printed.read_text(errors="replace").strip()[-_LAST_WORDS:] if printed.exists() else ""
            known["ended"] = f"the process ended with {process.exitcode}" + (f": {said}" if said else "")
    return known


def read_rows(file: Path) -> list[Known]:
    """Return what is kept in a file, one JSON object a line; none if it is missing. A half-written line is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(file: Path, row: Known) -> None:
    """Add a line to a file that `read_rows` reads; a half-written last line stays one of its own."""
    broken = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as out:
        out.write(("\n" if broken else "") + json.dumps(row) + "\n")


def shard(text: str) -> tuple[int, int]:
    """Read which part of the work is asked for: ``i/n`` is every n-th piece from the i-th."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is i/n with i from 1 to n, not {text}")
    return int(index), int(count)


def _listen(receiving: Connection, deadline: float) -> tuple[Known, bool]:
    """Return the last report before the process ended or the deadline passed, and whether it passed."""
    known: Known = {}
    while receiving.poll(max(0.0, deadline - time.monotonic())):
        try:
            known = receiving.recv()
        except EOFError:
            return known, False
    return known, True


def _child(job: Job, name: str, sending: Connection, printed: Path, memory: int | None) -> None:
    words = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job(name, sending.send)
