"""Reads a run's `report.json` and refuses what this version cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mil_cli.errors import OutputError

Report = dict[str, Any]

FILE = "report.json"
VERSION = 1
"""The version of the report that is read and shown."""

AGAIN = "run the recipe again"
"""What to do about a file that is damaged."""

_PARTS = {"recipe": dict, "baseline": dict, "final": dict, "stages": list, "goals": list, "goals_met": bool}


def load_report(path: Path) -> Report:
    """Return the report of a run.

    Args:
        path: The run's folder, or its `report.json`.

    Raises:
        OutputError: There is none, it is damaged, or it has another version.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        hint = "a run that did not end has none: run the same command again"
        raise OutputError("there is no report here", where=str(path), hint=hint)
    content = read(file)
    check_report(content, where=str(file))
    report: Report = content
    return report


def read(file: Path) -> Any:
    """Return the content of a JSON file of a run.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"the report cannot be read: {error}", where=str(file), hint=AGAIN) from None


def check_report(content: object, *, where: str) -> None:
    """Refuse a report that is damaged or of another version.

    Raises:
        OutputError: Says what is wrong.
    """
    parts = check_version(content, VERSION, what="the report", where=where)
    for name, kind in _PARTS.items():
        if not isinstance(parts.get(name), kind):
            raise OutputError(f"the report is damaged: it has no proper '{name}'", where=where, hint=AGAIN)


def check_version(content: object, version: int, *, what: str, where: str) -> dict[str, Any]:
    """Return the content of a file, a mapping of the version that this mil reads.

    Args:
        content: What was read.
        version: The version.
        what: What the file holds, for errors.
        where: The file.

    Raises:
        OutputError: It is no mapping, or has another version.
    """
    if not isinstance(content, dict):
        raise OutputError(f"{what} is damaged: it is not a mapping", where=where, hint=AGAIN)
    found = content.get("version")
    if found != version:
        newer = isinstance(found, int) and found > version
        hint = "install the newer mil that wrote it" if newer else AGAIN
        raise OutputError(
            f"{what} has another version than {version}, which this mil reads", where=where, value=found, hint=hint
        )
    return content
