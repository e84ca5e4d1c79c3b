"""Starts the measuring process, hands it a job, and turns its end into a result or an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mil_cli
from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError

Feeds = Mapping[str, npt.NDArray[Any]]

_LAST_WORDS = 2000
"""Characters of the process's stderr that an error shows."""


def run_job(
    kind: str,
    files: Sequence[Path],
    *,
    device: DeviceProfile,
    feeds: Feeds,
    settings: Mapping[str, Any] | None = None,
    on_advance: Callable[[int], None] | None = None,
) -> Any:
    """Do one job of `mil_cli.measure.worker` in a fresh process.

    Args:
        kind: ``latency``, ``memory``, ``energy`` or ``operators``.
        files: The ONNX files.
        device: Threads and provider.
        feeds: Input name -> array, batch 1.
        settings: What else the job needs.
        on_advance: Called with the number of rounds that were done since.

    Raises:
        MeasureError: A file is missing, the runtime failed on it, or the process was killed.
    """
    for file in files:
        if not file.is_file():
            raise MeasureError("there is no such file", where=str(file), hint="check the path")
    for name, array in feeds.items():
        if array.dtype.hasobject:
            raise MeasureError("an input must be numbers to be measured", where=name, value=str(array.dtype))
    with tempfile.TemporaryDirectory(prefix="mil-measure-") as folder:
        archive = Path(folder) / "feeds.npz"
        arrays: dict[str, Any] = {f"input_{position}": array for position, array in enumerate(feeds.values())}
        np.savez(archive, **arrays)
        job = {
            "kind": kind,
            "files": [str(file.absolute()) for file in files],
            "threads": device.threads,
            "provider": device.provider,
            "provider_options": {key: str(value) for key, value in device.provider_options.items()},
            "feeds": str(archive),
            "input_names": list(feeds),
            **(settings or {}),
        }
        with (Path(folder) / "stderr").open("w+b") as words:
            return _communicate(job, words, on_advance or (lambda _: None))


def _communicate(job: Mapping[str, Any], words: Any, on_advance: Callable[[int], None]) -> Any:
    # -P: the present folder is not searched for modules, so a user's numpy.py there is not imported.
    command = [sys.executable, "-P", "-m", "mil_cli.measure.worker"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=_environment(), encoding="utf-8"
    )
    answer: dict[str, Any] = {}
    try:
        with process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the measuring process has no pipes")
            try:
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it ended at once; its last words say why
            for line in process.stdout:
                message = json.loads(line)
                if "advance" in message:
                    on_advance(message["advance"])
                else:
                    answer = message
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode == 0 and "result" in answer:
        return answer["result"]
    raise _failure(job, answer, process.returncode, words)


def _environment() -> dict[str, str]:
    """Return the environment with this installation first on the module path."""
    home = str(Path(mil_cli.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([home, inherited] if inherited else [home])}


def _failure(job: Mapping[str, Any], answer: Mapping[str, Any], code: int, words: Any) -> MeasureError:
    words.seek(0)
    said = words.read().decode("utf-8", errors="replace").strip()[-_LAST_WORDS:]
    names = ", ".join(job["files"])
    if "error" in answer:
        return MeasureError(
            f"onnxruntime failed: {answer['error']}",
            where=answer.get("file", names),
            hint="export the model again; check that its inputs fit the data",
        )
    if code < 0:
        name = signal.Signals(-code).name
        memory = name == "SIGKILL"
        return MeasureError(
            f"the measuring process was killed by {name}" + (f"; its last words: {said}" if said else ""),
            where=names,
            hint="most likely the memory ran out: close other programs, or measure fewer models at a time"
            if memory
            else "onnxruntime crashed on the model: export it again, or try another version of onnxruntime",
        )
    last = said.splitlines()[-1] if said else "nothing"
    return MeasureError(
        f"the measuring process ended with exit code {code}; its last words: {last}",
        where=names,
        hint="`mil doctor` checks the installation",
    )
