"""Errors become one message and the right exit code; nothing else does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mil_cli.cli import main as main_module
from mil_cli.cli.main import main
from mil_cli.errors import RecipeError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that puts a verb `act` of one's own into a fresh command line."""

    def install(function: object) -> None:
        application = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
        application.command("act")(function)  # type: ignore[type-var]
        application.callback()(lambda: None)
        monkeypatch.setattr(main_module, "app", application)

    return install


def raising(error: BaseException) -> object:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            RecipeError("is wrong", where="a.b", value=3, hint="do this"),
            2,
            "error: a.b: is wrong (got 3)\n  -> do this\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: what was reached is saved; the same command goes on from there\n"),
        (PermissionError(13, "Permission denied", "/nowhere/x"), 2, "error: cannot read or write /nowhere/x"),
        (OSError(28, "No space left on device", "/full/x"), 2, "free some space"),
        (SystemExit(0), 2, "error: the recipe's code ended the program: SystemExit: 0\n  -> "),
    ],
)
def test_errors_of_the_user(verb, error, code, message, capsys) -> None:  # type: ignore[no-untyped-def]
    verb(raising(error))
    assert main(["act"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_bug_is_one_line_on_screen_and_a_traceback_in_a_file(verb, capsys, private_cache) -> None:  # type: ignore[no-untyped-def]
    verb(raising(ValueError("secret detail\nsecond line")))
    assert main(["act"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("internal error: ValueError: secret detail (the traceback is in ")
    assert shown.count("\n") == 1
    (log,) = Path(private_cache).glob("error-*.log")
    assert "Traceback" in log.read_text()
    assert str(log) in shown


def test_a_bug_in_a_run_goes_to_the_runs_log(verb, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    log = tmp_path / "run" / "log.txt"
    log.parent.mkdir()
    log.write_text("what came before\n")
    error = ValueError("x")
    vars(error)["mil_log"] = log
    verb(raising(error))
    assert main(["act"]) == 1
    assert f"(the traceback is in {log})" in capsys.readouterr().err
    assert log.read_text().startswith("what came before\nTraceback")


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_verbs_own_code_is_returned(verb, code) -> None:  # type: ignore[no-untyped-def]
    verb(lambda: code)
    assert main(["act"]) == code


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["compress"], ["compress", "x", "--nope"], ["list", "nothing"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if arguments:
        assert "--help" in captured.err


def test_close_verbs_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compres"]) == 2
    assert "compress" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mil_cli", "list"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == b""


def test_what_the_encoding_lacks_is_shown_as_escapes() -> None:
    code = (
        "import sys, typer\nfrom mil_cli.cli import console, main as m\n"
        "app = typer.Typer()\n"
        "@app.command()\ndef act():\n    console.results().print('f\\xfcr')\n"
        "m.app = app\nsys.exit(m.main([]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, rb"f\xfcr")


def test_a_run_whose_reader_has_gone_goes_on_to_its_own_exit_code() -> None:
    code = (
        "import sys, typer\nfrom mil_cli.cli import console, main as m\n"
        "app = typer.Typer()\n"
        "@app.command()\ndef act():\n"
        "    for stream in (console.messages(), console.results(), console.results()):\n"
        "        stream.print('a line')\n"
        "    return 3\n"
        "m.app = app\nsys.exit(m.main([]))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, check=False)
    os.close(write)
    assert done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts(number: signal.Signals) -> None:
    # A shell starts what runs in the background with SIGINT ignored, which children inherit.
    code = (
        "import signal, sys, time, typer\nfrom mil_cli.cli import main as m\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "app = typer.Typer(); app.callback()(lambda: None)\n"
        "def act():\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "app.command()(act)\nm.app = app\nsys.exit(m.main(['act']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert b"interrupted" in process.stderr.read()


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {**{name: value for name, value in os.environ.items() if name not in names}, **given}
    code = "import os; from mil_cli.cli.main import main; main(['--version']); print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == expected
