"""The folder of one run: where it is, what goes into it, and going on in it after a kill."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path

from mil_cli.errors import OutputError
from mil_cli.files import TEMPORARY_PREFIX, output_error, write_text, writing
from mil_cli.run.locks import try_lock

RECIPE = "recipe.yaml"
REPORT = "report.json"
RANKING = "ranking.json"
PAGE = "report.html"


class RunDirectory:
    """One run's folder, locked while the run lives.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        for leftover in path.rglob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)

    @classmethod
    def open(cls, *, recipe_name: str, resolved: str, out: Path | None, now: datetime, base: Path) -> RunDirectory:
        """Make the folder of a run, or take up the one that a killed run of the same recipe left.

        Args:
            recipe_name: Names the folder below ``runs/``.
            resolved: The resolved recipe as YAML; it is written into the folder.
            out: The folder itself, if the user chose one.
            now: Names the folder when the user did not.
            base: Where ``runs/`` is.

        Raises:
            OutputError: The folder cannot be written, or another run writes it now.
        """
        try:
            if out is not None:
                lock = try_lock(out)
                if lock is None:
                    raise OutputError(f"another run is writing {out}", hint="wait for it, or give another --out")
                directory = cls(out, lock)
                for name in (REPORT, RANKING, PAGE):  # what an earlier run left is not this one's
                    (out / name).unlink(missing_ok=True)
            else:
                parent = base / "runs" / recipe_name
                directory = _unfinished(parent, resolved) or _new(parent, now)
            write_text(directory.path / RECIPE, resolved)
        except OSError as error:
            raise output_error(error, out or base / "runs") from error
        return directory

    def take(self, source: Path, name: str) -> Path:
        """Copy a file into the folder under `name`, in one step.

        Raises:
            OutputError: It cannot be written.
        """
        target = self.path / name
        with writing(target) as temporary:
            shutil.copyfile(source, temporary)
        return target

    def point_latest(self) -> None:
        """Let ``latest`` beside a dated folder point to it."""
        link = self.path.parent / "latest"
        if self.path.parent.parent.name != "runs" or (link.exists() and not link.is_symlink()):
            return
        with writing(link) as temporary:
            temporary.symlink_to(self.path.name)

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)


def _unfinished(parent: Path, resolved: str) -> RunDirectory | None:
    """Return the newest folder of a run of the same recipe that ended without a result, if there is one."""
    if not parent.is_dir():
        return None
    for folder in sorted(parent.iterdir(), reverse=True):
        finished = any((folder / name).exists() for name in (REPORT, RANKING))
        if folder.is_symlink() or not folder.is_dir() or finished:
            continue
        recipe = folder / RECIPE
        if not recipe.is_file() or recipe.read_text(encoding="utf-8") != resolved:
            continue
        lock = try_lock(folder)
        if lock is not None:
            return RunDirectory(folder, lock)
    return None


def _new(parent: Path, now: datetime) -> RunDirectory:
    stamp = now.strftime("%Y-%m-%d_%H-%M-%S")
    attempt = 0
    while True:
        folder = parent / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        if not folder.exists():
            lock = try_lock(folder)
            if lock is not None:
                return RunDirectory(folder, lock)
        attempt += 1
