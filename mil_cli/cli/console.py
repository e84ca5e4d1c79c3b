"""The two consoles of the command line: results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

WIDE = 160
"""Columns when the output is no terminal: wide enough that tables are not wrapped in a pipe or a log."""


class _Console(Console):
    """A console that falls silent when its reader has gone (``mil compress ... | head``).

    rich would end the program, with an exit code that says nothing of the run's goals.
    """

    def on_broken_pipe(self) -> None:
        """Write no more, and let Python flush what is left into nothing."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def results() -> Console:
    """Return a console on stdout."""
    width = None if sys.stdout.isatty() else WIDE
    return _Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def messages() -> Console:
    """Return a console on stderr."""
    width = None if sys.stderr.isatty() else WIDE
    return _Console(file=sys.stderr, width=width, highlight=False, stderr=True)


def from_here(path: Path) -> Path:
    """Return a path as it is typed from the present folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
