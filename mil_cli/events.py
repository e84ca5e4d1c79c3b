"""How long work tells what it is doing: a progress sink that every stage and loop is handed.

The sink is a protocol, so that the command line can draw bars, a log can write lines, and a test can record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """One running piece of work with a known or unknown number of steps."""

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Report that `steps` more are done; `note` is a short live figure such as ``loss 0.31``."""


class Progress(Protocol):
    """Where progress, notices and warnings go."""

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        """Open a piece of work of `total` steps, `done` of them by an earlier run; the advances give the ETA."""
        ...

    def notice(self, text: str) -> None:
        """Tell the user something worth knowing that is not an error."""


class _SilentBar:
    def advance(self, steps: int = 1, *, note: str = "") -> None:
        pass


class SilentProgress:
    """A sink that drops everything: for library use and tests."""

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        """Open a piece of work that is shown nowhere."""
        yield _SilentBar()

    def notice(self, text: str) -> None:
        """Drop the notice."""
