"""Locks on folders: exclusive between processes, released by a kill, safe when the folder is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from mil_cli.run.locks import locked, try_lock

_HOLD = """
import sys, time
from pathlib import Path
from mil_cli.run.locks import try_lock
assert try_lock(Path(sys.argv[1])) is not None
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_excludes_another_process_and_dies_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert try_lock(folder) is None
        holder.send_signal(signal.SIGKILL)
    lock = try_lock(folder)
    assert lock is not None
    assert list(folder.iterdir()) == []
    os.close(lock)


def test_waiting_is_told_once_and_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    told: list[str] = []
    holder = try_lock(folder)
    assert holder is not None

    def release() -> None:
        told.append("waiting")
        folder.rmdir()  # as the owner does when its result is stored
        os.close(holder)

    with locked(folder, on_wait=release):
        assert folder.is_dir()
        assert try_lock(folder) is None
    assert told == ["waiting"]
