"""The content-addressed store of stage results, exports and measurements.

Layout of the cache folder::

    entries/<key>/<trace>/   a finished result: its files and entry.json (checksums, trace, facts)
    work/<key>/              the one who computes <key> now: its lock, its checkpoints, its result until the rename

A key holds what is known before a stage runs (upstream model, settings, code, versions). What it read from its
surroundings is known only afterwards, so a key may have several entries, each with the trace of its reads; one is
valid if everything that it had read still has the same fingerprint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil_cli.errors import CacheError
from mil_cli.events import Progress
from mil_cli.files import output_error, sha256_of_file, write_json
from mil_cli.run.locks import locked

FORMAT = 1
ENTRY = "entry.json"
"""The file of an entry that is not part of its result."""


def default_location() -> Path:
    """Return ``$MIL_CACHE``, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("MIL_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("mil")


@dataclass(frozen=True)
class Entry:
    """A finished result in the cache.

    Attributes:
        folder: Where its files are.
        facts: What the computing side stored: JSON-able.
        trace: What was read: name -> fingerprint.
    """

    folder: Path
    facts: dict[str, Any]
    trace: dict[str, str]


@dataclass(frozen=True)
class Listed:
    """One line of ``mil cache``: what an entry is, its size in bytes and its age in seconds."""

    folder: Path
    kind: str
    label: str
    size_bytes: int
    age_seconds: float


class Workspace:
    """The folder of a computation under way; it outlives a kill, and goes when the result is stored.

    Attributes:
        folder: Where checkpoints go.
        result: Where the result's files go; empty at the start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = folder / "result"
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir(parents=True)

    @property
    def _trace_file(self) -> Path:
        return self.folder / "trace.json"

    def remember(self, reads: dict[str, str], seconds: float) -> None:
        """Write down what the checkpoints depend on, and the seconds spent so far."""
        write_json(self._trace_file, {"reads": reads, "seconds": seconds})

    def remembered(self) -> tuple[dict[str, str], float] | None:
        """Return what the checkpoints found here depend on, and the seconds they cost; None if there are none."""
        try:
            stored = json.loads(self._trace_file.read_text())
            return dict(stored["reads"]), float(stored["seconds"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def remove(self) -> None:
        """Remove the whole workspace: its result is stored, or was found to exist."""
        shutil.rmtree(self.folder)

    def forget_checkpoints(self) -> None:
        """Remove whatever an earlier attempt left."""
        for path in self.folder.iterdir():
            if path != self.result:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Cache:
    """A stage cache at one place.

    Args:
        location: Its folder; made when first written.
        progress: Where warnings go.
    """

    def __init__(self, location: Path, progress: Progress) -> None:
        self.location = location
        self._progress = progress

    def find(self, key: str, valid: Callable[[dict[str, str]], bool]) -> Entry | None:
        """Return an intact entry of `key` whose trace is `valid`, or None. A damaged entry is removed with a notice."""
        folder = self.location / "entries" / key
        for candidate in sorted(folder.iterdir()) if folder.is_dir() else []:
            try:
                record = json.loads((candidate / ENTRY).read_text())
                if record["format"] != FORMAT:
                    continue
                trace = dict(record["trace"])
                if not valid(trace):
                    continue
                for name, checksum in record["files"].items():
                    if sha256_of_file(candidate / name) != checksum:
                        raise ValueError(f"{name} was changed")
                with suppress(OSError):  # what another user stored in a shared cache only they may touch
                    os.utime(candidate)
                return Entry(candidate, record["facts"], trace)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._progress.notice(f"a damaged cache entry is computed again ({candidate}: {error})")
                shutil.rmtree(candidate, ignore_errors=True)
        return None

    @contextmanager
    def computing(self, key: str, label: str) -> Iterator[Workspace]:
        """Hold the one right to compute `key`; others wait, then look again with `find`.

        Raises:
            OutputError: The cache cannot be written.
        """
        folder, begun = self.location / "work" / key, False
        try:
            with locked(folder, on_wait=lambda: self._progress.notice(f"{label}: waiting for another run of the same")):
                workspace, begun = Workspace(folder), True
                yield workspace
        except OSError as error:
            if begun and not self._is_ours(error):  # the recipe's own code could not read a file of its own, say
                raise
            raise output_error(error, folder) from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether an error is about the cache: about a file in it, or a full disk."""
        if error.filename is None:
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Path(os.fsdecode(error.filename)).is_relative_to(self.location)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the right to time models: runs that share this cache must not disturb each other's figures."""
        folder = self.location / "work" / "measuring"
        with locked(folder, on_wait=lambda: self._progress.notice("waiting for another run's measurement")):
            try:
                yield
            finally:
                folder.rmdir()

    def store(
        self, key: str, workspace: Workspace, *, kind: str, label: str, trace: dict[str, str], facts: dict[str, Any]
    ) -> Entry:
        """Give the result in `workspace` its final name, and remove the workspace.

        Raises:
            OutputError: The cache cannot be written.
        """
        files = {
            str(path.relative_to(workspace.result)): sha256_of_file(path)
            for path in sorted(workspace.result.rglob("*"))
            if path.is_file()
        }
        record = {"format": FORMAT, "kind": kind, "label": label, "files": files, "trace": trace, "facts": facts}
        write_json(workspace.result / ENTRY, record)
        name = sha256_of_file(workspace.result / ENTRY)[:16]
        final = self.location / "entries" / key / name
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                shutil.rmtree(final)
            os.replace(workspace.result, final)
            workspace.remove()
        except OSError as error:
            raise output_error(error, final) from error
        return Entry(final, facts, trace)

    def drop(self, key: str) -> None:
        """Remove every entry of `key` and what an unfinished attempt left, for a fresh start."""
        shutil.rmtree(self.location / "entries" / key, ignore_errors=True)

    def memo(
        self, key: str, *, kind: str, label: str, fresh: bool, compute: Callable[[Path], dict[str, Any]]
    ) -> tuple[Entry, bool]:
        """Return the entry of a key that says everything by itself, computing it if missing.

        Args:
            key: Full content key.
            kind: What it is, for listings.
            label: What it is of, for listings.
            fresh: Compute even if there is one.
            compute: Writes files into the folder given and returns JSON-able facts.

        Returns:
            The entry, and whether it was there.
        """
        if fresh:
            self.drop(key)
        entry = self.find(key, lambda _: True)
        if entry is not None:
            return entry, True
        with self.computing(key, label) as workspace:
            entry = self.find(key, lambda _: True)
            if entry is not None:
                workspace.remove()
                return entry, True
            facts = compute(workspace.result)
            return self.store(key, workspace, kind=kind, label=label, trace={}, facts=facts), False

    def entries(self) -> list[Listed]:
        """List what the cache holds, the newest first: finished results, and unfinished work."""
        found = []
        for place in (self.location, *self.location.glob("processes/*")):
            for folder in place.glob("entries/*/*"):
                try:
                    record = json.loads((folder / ENTRY).read_text())
                    kind, label = str(record["kind"]), str(record["label"])
                except (OSError, ValueError, KeyError, TypeError):
                    kind, label = "damaged", folder.name
                found.append((folder, kind, label))
            found += [(folder, "unfinished", folder.name[:12]) for folder in place.glob("work/*")]
        listed = []
        for folder, kind, label in found:
            with suppress(FileNotFoundError):  # a run that goes on now stored or removed it
                listed.append(Listed(folder, kind, label, _size(folder), time.time() - folder.stat().st_mtime))
        return sorted(listed, key=lambda each: each.age_seconds)

    def clear(self, *, older_than_seconds: float = 0.0) -> tuple[int, int]:
        """Remove entries last used longer ago than that; return how many, and their bytes.

        Work that another process is doing now is left alone.

        Raises:
            CacheError: An entry cannot be removed.
        """
        from mil_cli.run.locks import try_lock

        count = size = 0
        for listed in self.entries():
            if listed.age_seconds < older_than_seconds:
                continue
            lock = try_lock(listed.folder) if listed.kind == "unfinished" else None
            if listed.kind == "unfinished" and lock is None:
                continue
            try:
                shutil.rmtree(listed.folder)
            except OSError as error:
                raise CacheError(f"cannot remove {listed.folder}: {error.strerror}", hint="remove it by hand") from None
            finally:
                if lock is not None:
                    os.close(lock)
            count += 1
            size += listed.size_bytes
        return count, size


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a checkpoint that was still being written
            size += path.stat().st_size if path.is_file() else 0
    return size
