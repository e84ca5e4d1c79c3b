"""Opens the folder of a run: its recipe, its environment and its log, and what happens when the run ends badly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mil_cli.errors import MilError
from mil_cli.events import Progress
from mil_cli.files import write_json
from mil_cli.run.directory import RunDirectory
from mil_cli.run.environment import describe
from mil_cli.run.log import LoggedProgress


@contextmanager
def open_run(
    name: str,
    resolved: Mapping[str, Any],
    *,
    progress: Progress,
    out: Path | None,
    base: Path,
    now: Callable[[], datetime],
) -> Iterator[tuple[RunDirectory, LoggedProgress]]:
    """Give the folder of a run and a progress sink that also writes its log; at the end ``latest`` points to it.

    Args:
        name: Names the folder below ``runs/``.
        resolved: The resolved recipe.
        progress: Where work is reported.
        out: The folder itself, if the user chose one.
        base: Where ``runs/`` is.
        now: The clock.

    Raises:
        OutputError: The folder cannot be written, or another run writes it now.
    """
    import yaml

    text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)
    directory = RunDirectory.open(recipe_name=name, resolved=text, out=out, now=now(), base=base)
    log = LoggedProgress(progress, directory.path / "log.txt", now)
    try:
        write_json(directory.path / "environment.json", describe())
        yield directory, log
        directory.point_latest()
    except MilError as error:
        log.write(str(error))
        raise
    except Exception as error:
        vars(error)["mil_log"] = directory.path / "log.txt"  # where the command line puts the traceback
        raise
    finally:
        directory.close()
