"""The progress sink: plain lines with a mock clock, and bars that leave a terminal clean."""

from __future__ import annotations

import io

from rich.console import Console

from mil_cli.cli.progress import BarProgress, LineProgress, duration, progress_on


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_lines_are_throttled_and_show_what_is_left() -> None:
    clock, console = Clock(), plain()
    sink = LineProgress(console, interval=10, clock=clock)
    with sink.work("training", total=100) as bar:
        for _ in range(50):
            clock.now += 1
            bar.advance(note="loss 0.31")
    assert lines(console) == [
        "training: 10/100, loss 0.31, 1 min 30 s left",
        "training: 20/100, loss 0.31, 1 min 20 s left",
        "training: 30/100, loss 0.31, 1 min 10 s left",
        "training: 40/100, loss 0.31, 1 min 0 s left",
        "training: 50/100, loss 0.31, 50.0 s left",
        "training: done in 50.0 s, loss 0.31",
    ]


def test_what_an_earlier_run_did_says_nothing_of_the_pace() -> None:
    clock, console = Clock(), plain()
    with LineProgress(console, interval=10, clock=clock).work("training", total=100, done=80) as bar:
        for _ in range(10):
            clock.now += 1
            bar.advance()
    assert lines(console)[0] == "training: 90/100, 10.0 s left"


def test_steps_of_an_earlier_run_do_not_count_as_fast() -> None:
    clock, console = Clock(), plain()
    with LineProgress(console, interval=10, clock=clock).work("training", total=100, done=80) as bar:
        clock.now = 10
        bar.advance(10)
    assert lines(console)[0] == "training: 90/100, 10.0 s left"


def test_short_work_prints_nothing() -> None:
    clock, console = Clock(), plain()
    sink = LineProgress(console, interval=10, clock=clock)
    for _ in range(20):
        with sink.work("one of many", total=1) as bar:
            clock.now += 0.1
            bar.advance()
    assert lines(console) == []


def test_unknown_total_counts_up() -> None:
    clock, console = Clock(), plain()
    with LineProgress(console, interval=10, clock=clock).work("reading") as bar:
        clock.now = 11
        bar.advance(7)
    assert lines(console)[0] == "reading: 7"


def test_failed_work_is_not_called_done() -> None:
    clock, console = Clock(), plain()
    sink = LineProgress(console, interval=10, clock=clock)
    try:
        with sink.work("training", total=2):
            clock.now = 100
            raise ValueError
    except ValueError:
        pass
    assert lines(console) == []


def test_long_notices_are_not_wrapped_in_a_pipe() -> None:
    console = plain()
    LineProgress(console).notice("word " * 60 + "[not markup]")
    assert len(lines(console)) == 1
    assert "[not markup]" in lines(console)[0]


def test_bars_on_a_terminal_go_when_the_work_is_done() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True)
    sink = progress_on(console)
    assert isinstance(sink, BarProgress)
    with sink.work("outer [x]", total=2) as outer:
        with sink.work("inner", total=5) as inner:
            inner.advance(5, note="loss 0.1")
        outer.advance()
        sink.notice("a notice")
    shown = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    assert "a notice" in shown
    assert sink._display.finished
    assert not sink._display.live.is_started


def test_off_a_terminal_there_are_lines() -> None:
    assert isinstance(progress_on(plain()), LineProgress)


def test_duration() -> None:
    assert [duration(value) for value in (0.0, 59.94, 61, 3661)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]
