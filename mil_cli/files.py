"""Writing files so that a reader never meets half of one: a temporary name beside the target, then a rename."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mil_cli.errors import OutputError

TEMPORARY_PREFIX = ".writing-"
"""How the names of files that are still being written begin; what a kill leaves behind can be found by it."""


def output_error(error: OSError, path: Path, *, doing: str = "write") -> OutputError:
    """Return the error to show a user for an OSError met at `path`.

    Args:
        error: What was met.
        path: Where.
        doing: What was not done there.
    """
    hints = {
        errno.ENOSPC: "the disk is full: free some space (`mil cache` shows what the stage cache holds) and run again",
        errno.EDQUOT: "your disk quota is used up: free some space and run again",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: f"you may not {doing} there: choose another folder or change its permissions",
        errno.EPERM: f"you may not {doing} there: choose another folder or change its permissions",
        errno.EEXIST: "a file is in the way: choose another folder",
        errno.ENOTDIR: "a file is in the way: choose another folder",
        errno.ENAMETOOLONG: "the path is too long: choose a shorter folder",
    }
    what = f"cannot {doing} {path}: {error.strerror or error}"
    return OutputError(what, hint=hints.get(error.errno or 0, "check the folder and run the same command again"))


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name `path`, on failure it is removed.

    Raises:
        OutputError: The file cannot be written (read-only, full, a file in the way).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{path.suffix}"
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one step.

    Raises:
        OutputError: The file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def finite(value: Any) -> Any:
    """Return a JSON-able value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
