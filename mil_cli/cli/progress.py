"""How the command line shows progress: bars with an ETA on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mil_cli.events import Bar
from mil_cli.events import Progress as ProgressSink


def progress_on(console: Console) -> ProgressSink:
    """Return bars if `console` is a terminal, else plain lines."""
    return BarProgress(console) if console.is_interactive else LineProgress(console)


class BarProgress:
    """Bars with an ETA, one below the other for nested work; a bar goes when its work is done.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        """Show a bar while the work is open."""
        if self._open == 0:
            self._display.start()
        self._open += 1
        task = self._display.add_task(escape(description), total=total, completed=done, note="")
        try:
            yield _DrawnBar(self._display, task)
        finally:
            self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.stop()

    def notice(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, highlight=False)


class _DrawnBar:
    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display = display
        self._task = task

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Move the bar."""
        if note:
            self._display.update(self._task, advance=steps, note=escape(note))
        else:
            self._display.update(self._task, advance=steps)


class LineProgress:
    """Plain lines for logs and pipes: at most one in `interval` seconds, and one when longer work ends.

    Args:
        console: Where lines go.
        interval: Seconds between lines of running work.
        clock: Seconds from any zero.
    """

    def __init__(
        self, console: Console, *, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._last = clock()

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        """Print how the work goes on, and that it is done if it took its time."""
        bar = _LineBar(self, description, total, done, self._clock())
        yield bar
        seconds = self._clock() - bar.started
        if seconds >= self._interval:
            self.line(f"{description}: done in {duration(seconds)}{bar.suffix}")

    def notice(self, text: str) -> None:
        """Print a line."""
        self.line(text)

    def line(self, text: str) -> None:
        """Print a line and start the interval anew."""
        self._last = self._clock()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def due(self) -> float | None:
        """Return the present time if a line of running work may be printed now."""
        now = self._clock()
        return now if now - self._last >= self._interval else None


class _LineBar:
    def __init__(self, sink: LineProgress, description: str, total: int | None, done: int, started: float) -> None:
        self._sink = sink
        self._description = description
        self._total = total
        self._done = done
        self._before = done
        self._note = ""
        self.started = started

    @property
    def suffix(self) -> str:
        return f", {self._note}" if self._note else ""

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Count, and print a line if one is due."""
        self._done += steps
        self._note = note or self._note
        now = self._sink.due()
        if now is None or self._done == self._total:
            return
        progress = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        text = f"{self._description}: {progress}{self.suffix}"
        if self._total is not None and self._done > self._before:
            left = (now - self.started) / (self._done - self._before) * (self._total - self._done)
            text += f", {duration(left)} left"
        self._sink.line(text)


def duration(seconds: float) -> str:
    """Write a duration as people say it: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
