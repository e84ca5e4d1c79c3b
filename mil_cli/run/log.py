"""The run's `log.txt`: every notice and piece of work with its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from mil_cli.events import Bar, Progress


class LoggedProgress:
    """A progress sink that also writes what it is told into a file.

    Args:
        inner: The sink that shows it.
        path: The log; lines are appended, so that a run that goes on keeps its story.
        now: The clock.
    """

    def __init__(self, inner: Progress, path: Path, now: Callable[[], datetime]) -> None:
        self._inner = inner
        self._path = path
        self._now = now

    def write(self, text: str) -> None:
        """Append a line with the time."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"{self._now().isoformat(timespec='seconds')} {text}\n")

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        """Open a piece of work; its beginning and end are logged."""
        self.write(f"begin {description}" + (f" ({total} steps)" if total is not None else ""))
        with self._inner.work(description, total, done=done) as bar:
            yield bar
        self.write(f"end {description}")

    def notice(self, text: str) -> None:
        """Show and log a notice."""
        self.write(text)
        self._inner.notice(text)
