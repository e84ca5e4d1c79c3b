"""The entry point: the verbs, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from mil_cli import __version__
from mil_cli.cli.cache import cache
from mil_cli.cli.compress import compress
from mil_cli.cli.doctor import doctor
from mil_cli.cli.export import export
from mil_cli.cli.init import init
from mil_cli.cli.inspect import inspect
from mil_cli.cli.list import list_
from mil_cli.cli.measure import measure
from mil_cli.cli.rank import rank
from mil_cli.cli.report import report
from mil_cli.errors import MilError

DONE, BUG, USAGE, GOAL_MISSED, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(compress)
app.command()(measure)
app.command()(export)
app.command()(inspect)
app.command("list")(list_)
app.command()(cache)
app.command()(report)
app.command()(rank)
app.command()(init)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mil {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Shrink a trained PyTorch model until it meets your goals, and prove it on the exported ONNX file.

    Exit codes: 0 done and all goals met; 3 done, a goal missed; 2 bad usage, recipe, data or model; 1 a bug;
    130 interrupted (the same command goes on where it was).
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows ``mil``; the process's own arguments by default.

    Returns:
        The exit code.
    """
    _interrupt_on_terminate()
    _let_waiting_threads_sleep()
    _show_any_character()
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="mil", standalone_mode=False)
        if code == INTERRUPTED:
            _say("interrupted: what was reached is saved; the same command goes on from there")
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except MilError as error:
        _say(f"error: {error}")
        return error.exit_code
    except typer.TyperException as error:
        text = error.format_message()
        if text:
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "mil"
            _say(f"error: {text}\n  -> {command} --help")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted: what was reached is saved; the same command goes on from there")
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            _say(f"error: the recipe's code ended the program: SystemExit: {error}\n  -> let it raise an error instead")
            return USAGE
        # The reader of our output is gone (`mil list | head`), which click ends with SystemExit: nothing is wrong.
        # Python must not flush what is left at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        from pathlib import Path

        from mil_cli.files import output_error

        if error.filename is None:
            return _bug(error)
        _say(f"error: {output_error(error, Path(os.fsdecode(error.filename)), doing='read or write')}")
        return USAGE
    except Exception as error:
        return _bug(error)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bug(error: Exception) -> int:
    """Put the traceback where it can be found and say so in one line."""
    from mil_cli.cli.crash import write_traceback

    message = str(error).splitlines()[0] if str(error) else "no message"
    _say(f"internal error: {type(error).__name__}: {message} ({write_traceback(error)})")
    return BUG


def _let_waiting_threads_sleep() -> None:
    """Tell OpenMP, before torch starts it, that idle threads should sleep.

    By default they spin for milliseconds: on a machine with anything else to do, training steps of small models then
    took twenty times as long. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _show_any_character() -> None:
    """Write what a terminal's encoding lacks, such as letters of a folder's name, as escapes, as stderr does anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _interrupt_on_terminate() -> None:
    """Let a polite kill end a run as Ctrl-C does: saved, with exit code 130."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Signals can be set in the main thread only; embedded elsewhere, the caller keeps its own handling.
        return
