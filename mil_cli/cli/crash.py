"""Where the traceback of a bug goes: the run's log, or a file of its own when no run was under way."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path


def write_traceback(error: BaseException) -> str:
    """Write the traceback of `error` into a file and say where it is.

    A run under way names its log in the exception's attribute ``mil_log``.
    """
    folder = os.environ.get("MIL_CACHE")
    if folder is None:
        from platformdirs import user_cache_dir

        folder = user_cache_dir("mil")
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    log = getattr(error, "mil_log", None)
    for path in (log, Path(folder) / name, Path(tempfile.gettempdir()) / name):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write("".join(traceback.format_exception(error)))
        except OSError:
            continue
        return f"the traceback is in {path}"
    return "no file could be written for the traceback"
