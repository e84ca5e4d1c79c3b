"""Locks on folders, held by the kernel: a killed process leaves none, and no lock file has to be cleaned up."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def _open_folder(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_still(descriptor: int, folder: Path) -> bool:
    """Whether the path still names the folder that was opened (its last owner may have removed it)."""
    try:
        now = os.stat(folder)
    except FileNotFoundError:
        return False
    then = os.fstat(descriptor)
    return (now.st_ino, now.st_dev) == (then.st_ino, then.st_dev)


def try_lock(folder: Path) -> int | None:
    """Lock `folder` without waiting; return a descriptor whose closing unlocks it, or None if another holds it."""
    while True:
        try:
            descriptor = _open_folder(folder)
        except FileNotFoundError:  # removed by its owner between the making and the opening
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_still(descriptor, folder):
            return descriptor
        os.close(descriptor)


@contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if needed; `on_wait` is called once if another process holds it."""
    descriptor = try_lock(folder)
    if descriptor is None:
        on_wait()
        while descriptor is None:
            try:
                waiting = _open_folder(folder)
            except FileNotFoundError:
                continue
            fcntl.flock(waiting, fcntl.LOCK_EX)
            if _is_still(waiting, folder):
                descriptor = waiting
            else:
                os.close(waiting)
    try:
        yield
    finally:
        os.close(descriptor)
