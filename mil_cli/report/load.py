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
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"the report cannot be read: {error}", where=str(file), hint="run the recipe again") from None
    check_report(content, where=str(file))
    report: Report = content
    return report


def check_report(content: object, *, where: str) -> None:
    """Refuse a report that is damaged or of another version.

    Raises:
        OutputError: Says what is wrong.
    """
    if not isinstance(content, dict):
        raise OutputError("the report is damaged: it is not a mapping", where=where, hint="run the recipe again")
    version = content.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        hint = "install the newer mil that wrote it" if newer else "run the recipe again"
        what = f"the report has another version than {VERSION}, which this mil reads"
        raise OutputError(what, where=where, value=version, hint=hint)
    for name, kind in _PARTS.items():
        if not isinstance(content.get(name), kind):
            hint = "run the recipe again"
            raise OutputError(f"the report is damaged: it has no proper '{name}'", where=where, hint=hint)
