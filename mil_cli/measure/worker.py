"""The process that measures: holds the sessions compared and nothing else; started by `mil_cli.measure.process`.

One JSON job on stdin; JSON lines on stdout: ``{"advance": n}`` as it goes, at the end ``{"result": ...}`` or
``{"error": ..., "file": ...}``. It imports numpy and onnxruntime only, so that nothing else takes part in what is
measured.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Emit = Callable[[Mapping[str, Any]], None]
Job = Mapping[str, Any]

_LOG_ERRORS_ONLY = 3

TURN_SECONDS = 0.005
"""How long a model's turn in a round lasts at least, if it takes no more than the most inferences."""

LONG_TURN_SECONDS = 0.3
"""How long the slowest model's turn lasts at most, if it takes more than one inference."""

LEAST_TURN, LONGEST_TURN = 3, 15
"""The fewest inferences of a turn, of which the fastest counts, unless they are long; and the most."""

_WARM_UP_WINDOW = 10
_WARM_UP_LEAST = 3
_WARM_UP_GAIN = 0.02
_WARM_UP_SECONDS = 2.0

_OVERHEAD_RUNS = 301
_SHORT_TURN = 0.0005
_LONGEST_SHORT_TURN = 20
_LEAST_PAIRS, _MOST_PAIRS = 9, 31
"""How operators are timed: seconds and runs of a turn, and how many pairs of turns."""


class FileFailure(Exception):
    """The runtime failed on a file.

    Args:
        file: The file.
        cause: What it said.
    """

    def __init__(self, file: str, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.file = file


def open_session(job: Job, file: str) -> Any:
    """Load a file into onnxruntime with the job's threads, none of which spins while it waits.

    Raises:
        FileFailure: onnxruntime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _LOG_ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(file, options, providers=[(job["provider"], job["provider_options"])])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise FileFailure(file, error) from error


def read_feeds(job: Job) -> dict[str, Any]:
    """Return the inputs: name -> array."""
    import numpy as np

    with np.load(job["feeds"], allow_pickle=False) as arrays:
        return {name: arrays[f"input_{position}"] for position, name in enumerate(job["input_names"])}


class Runner:
    """One session with its inputs.

    Args:
        job: What is measured.
        file: The ONNX file.
        feeds: Input name -> array.
    """

    def __init__(self, job: Job, file: str, feeds: Mapping[str, Any]) -> None:
        self._file = file
        self._session = open_session(job, file)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._feeds = dict(feeds)
        try:
            self.time()
        except Exception as error:
            raise FileFailure(file, error) from error

    def time(self) -> tuple[float, float]:
        """Run once and return the seconds that passed and the seconds of processor time of this thread."""
        started, worked = time.perf_counter(), time.thread_time()
        self._session.run(self._outputs, self._feeds)
        return time.perf_counter() - started, time.thread_time() - worked

    def warm_up(self) -> float:
        """Run until it gets no faster, and return the seconds of one run then."""
        began = time.perf_counter()
        before = math.inf
        while True:
            now = self._window()
            if now > before * (1 - _WARM_UP_GAIN) or time.perf_counter() - began > _WARM_UP_SECONDS:
                return now
            before = now

    def _window(self) -> float:
        """Return the median seconds of a few runs; fewer if they are long."""
        times: list[float] = []
        while len(times) < _WARM_UP_LEAST or (len(times) < _WARM_UP_WINDOW and sum(times) < _WARM_UP_SECONDS / 2):
            times.append(self.time()[0])
        return statistics.median(times)


def latency(job: Job, emit: Emit) -> list[list[list[list[tuple[float, float]]]]]:
    """Time all files interleaved.

    The sessions are rebuilt `job["sessions"]` times; each time, after warm-up, every round gives each model one turn,
    in an order that is reversed from round to round. A turn is a few inferences, more if they are short: what the model
    before has left in the caches, and what other programs take, leaves the fastest of them alone. It is as many for
    each model.

    Returns:
        Seconds of every inference: [session][file][round][inference of the turn][passed, of processor time].
    """
    feeds = read_feeds(job)
    files: Sequence[str] = job["files"]
    result: list[list[list[list[tuple[float, float]]]]] = []
    for _ in range(job["sessions"]):
        runners = [Runner(job, file, feeds) for file in files]
        turn = turn_length([runner.warm_up() for runner in runners])
        times: list[list[list[tuple[float, float]]]] = [[] for _ in files]
        order = list(range(len(files)))
        gc.collect()
        gc.disable()
        for _ in range(job["rounds"]):
            for index in order:
                runner = runners[index]
                times[index].append([runner.time() for _ in range(turn)])
            order.reverse()
            emit({"advance": 1})
        gc.enable()
        result.append(times)
        del runners
    return result


def turn_length(seconds: Sequence[float]) -> int:
    """Return the inferences of a turn: as many as the fastest model needs, and no more than the slowest one bears.

    Args:
        seconds: What one of each model takes.
    """
    wanted = min(max(LEAST_TURN, math.ceil(TURN_SECONDS / min(seconds))), LONGEST_TURN)
    return min(wanted, max(1, int(LONG_TURN_SECONDS / max(seconds))))


def memory(job: Job, emit: Emit) -> int:
    """Return by how many bytes loading a file and running it raises the peak of a process that has the runtime."""
    import onnxruntime  # noqa: F401  what the bare runtime takes is what is subtracted

    bare = peak_bytes()
    Runner(job, job["files"][0], read_feeds(job))
    return peak_bytes() - bare


def peak_bytes() -> int:
    """Return the largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its figure on Linux includes what the parent had before this process began.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def energy(job: Job, emit: Emit) -> float:
    """Return the joules of one inference, by the processor's counters around a loop of inferences."""
    runner = Runner(job, job["files"][0], read_feeds(job))
    runner.warm_up()
    counters = [Path(folder) for folder in job["counters"]]
    before = [_read(folder / "energy_uj") for folder in counters]
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < job["seconds"]:
        runner.time()
        count += 1
    after = [_read(folder / "energy_uj") for folder in counters]
    microjoules = 0
    for folder, first, last in zip(counters, before, after, strict=True):
        # The counter starts anew when it reaches its range.
        microjoules += last - first if last >= first else last - first + _read(folder / "max_energy_range_uj")
    return microjoules / 1e6 / count


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


_WHOLE = {"tensor(int64)": "int64", "tensor(uint8)": "uint8", "tensor(int8)": "int8"}


class BoundRunner:
    """One session whose inputs and outputs stay where they are, so that only the model's own work is timed.

    Args:
        job: What is measured.
        file: The ONNX file; its inputs are made up. Axes of unknown size have one element.
    """

    def __init__(self, job: Job, file: str) -> None:
        import numpy as np

        self._session = open_session(job, file)
        self._binding = self._session.io_binding()
        self._clock = time.thread_time if job["processor_time"] else time.perf_counter
        generator = np.random.default_rng(0)
        for given in self._session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in given.shape]
            dtype = _WHOLE.get(given.type)  # of indices there always is a first
            data = generator.standard_normal(shape, np.float32) if dtype is None else np.zeros(shape, dtype)
            self._binding.bind_cpu_input(given.name, data)
        for output in self._session.get_outputs():
            self._binding.bind_output(output.name)
        try:
            self.time(1)
        except Exception as error:
            raise FileFailure(file, error) from error

    def time(self, runs: int) -> float:
        """Run so many times and return the seconds of one."""
        started = self._clock()
        for _ in range(runs):
            self._session.run_with_iobinding(self._binding)
        return float(self._clock() - started) / runs


def operators(job: Job, emit: Emit) -> dict[str, Any]:
    """Time many small models that hold one operator each.

    The first file is an empty model: what a run takes whatever the model is. Then each two files hold an operator once
    and `job["copies"]` times; a copy takes what the second takes longer than the first, over the copies that it has
    more, the median over turns that lie close together. What the ends of a model take falls out.

    Returns:
        ``overhead``: seconds of the empty model. ``seconds``: those of each operator, or what the runtime said of it.
    """
    empty, *files = job["files"]
    runner = Runner(job, empty, read_feeds(job))
    runner.warm_up()
    clock = 1 if job["processor_time"] else 0
    overhead = statistics.median(runner.time()[clock] for _ in range(_OVERHEAD_RUNS))
    seconds: list[float | str] = []
    gc.collect()
    gc.disable()
    for once, several in zip(files[::2], files[1::2], strict=True):
        try:
            seconds.append(_seconds_of_a_copy(job, BoundRunner(job, once), BoundRunner(job, several)))
        except FileFailure as failure:
            seconds.append(str(failure))
        emit({"advance": 1})
    gc.enable()
    return {"overhead": overhead, "seconds": seconds}


def _seconds_of_a_copy(job: Job, once: BoundRunner, several: BoundRunner) -> float:
    for runner in (once, several):
        runner.time(_WARM_UP_LEAST)
    longest = several.time(_WARM_UP_LEAST)
    runs = min(max(1, math.ceil(_SHORT_TURN / max(longest, 1e-7))), _LONGEST_SHORT_TURN)
    rounds = min(max(_LEAST_PAIRS, math.ceil(job["seconds"] / (2 * runs * max(longest, 1e-7)))), _MOST_PAIRS)
    differences = [several.time(runs) - once.time(runs) for _ in range(rounds)]
    return max(0.0, float(statistics.median(differences)) / (int(job["copies"]) - 1))


JOBS: dict[str, Callable[[Job, Emit], Any]] = {
    "latency": latency,
    "memory": memory,
    "energy": energy,
    "operators": operators,
}


def main() -> int:
    """Do the job on stdin."""
    job = json.load(sys.stdin)
    with _answers() as answers:

        def emit(message: Mapping[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            emit({"result": JOBS[job["kind"]](job, emit)})
        except FileFailure as failure:
            emit({"error": str(failure), "file": failure.file})
            return 1
        except MemoryError:
            emit({"error": "not enough memory"})
            return 1
    return 0


def _answers() -> TextIO:
    """Return the real stdout, and let what libraries print go to stderr."""
    real = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(real, "w", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
