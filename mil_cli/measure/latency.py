"""Latency of several models, timed interleaved in one fresh process: the one protocol of all latencies shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError
from mil_cli.events import Progress, SilentProgress
from mil_cli.measure.process import Feeds, run_job
from mil_cli.measure.statistics import Array, paired_ratio, percentiles, ratio_interval, verdict
from mil_cli.measure.types import Latency

LATENCY_VERSION: Final = 3
"""The version of how latencies are timed: figures of two versions are not compared."""

LEAST_ROUNDS = 60
"""Fewer rounds do not carry an interval."""

PASSED, PROCESSOR = 0, 1
"""The two clocks of the worker: time that passed, and processor time of the thread that runs the model."""

_LOOK_SECONDS = 0.3
_TOLERATED_CORES = 0.3


def measure_latency(
    files: Sequence[Path],
    *,
    device: DeviceProfile,
    feeds: Feeds,
    baseline_index: int = 0,
    rounds: int = LEAST_ROUNDS,
    sessions: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Latency]:
    """Time models side by side.

    Percentiles are of the time that passed, over all inferences. The ratio to the baseline pairs turns that lie close
    together, each of which counts by the fastest of its few inferences: what disturbs a machine only adds; with one
    thread on the processor it is of processor time, which equals the time that passed on a machine that does nothing
    else, and is not disturbed where other programs run (without it, a scheduler whose slices keep step with the turns
    makes a model look twice as slow).

    Args:
        files: The ONNX files; all take the same inputs.
        device: Threads and provider.
        feeds: Input name -> array of one sample (batch 1).
        baseline_index: Which file the others are compared with.
        rounds: Rounds with each set of sessions, at least 60.
        sessions: How often all sessions are rebuilt: two sessions of one file differ by 1 to 2 % for good.
        seed: Seeds the bootstrap.
        progress: Where rounds are reported.

    Returns:
        One latency for each file.

    Raises:
        MeasureError: Too few rounds, or the runtime failed on a file.
    """
    if not files:
        raise MeasureError("there is nothing to measure", hint="name at least one model")
    if rounds < LEAST_ROUNDS:
        raise MeasureError("too few rounds for an interval", value=rounds, hint=f"measure {LEAST_ROUNDS} or more")
    if sessions < 1:
        raise MeasureError("at least one session is needed", value=sessions, hint="set measure.sessions to 3")
    sink = SilentProgress() if progress is None else progress
    _warn_if_busy(device.threads, sink)
    with sink.work("measuring latency", rounds * sessions) as bar:
        seconds = run_job(
            "latency",
            files,
            device=device,
            feeds=feeds,
            settings={"rounds": rounds, "sessions": sessions},
            on_advance=bar.advance,
        )
    # With one thread the ratio is of processor time: what the processor did for other programs is not the model's.
    clock = PROCESSOR if device.threads == 1 and device.provider == "CPUExecutionProvider" else PASSED
    turns = turn_times(seconds, clock)
    generator = np.random.default_rng(seed)
    latencies = []
    for index in range(len(files)):
        every = np.concatenate([np.ravel(np.array(models[index])[..., PASSED]) for models in seconds])
        p50, p90, p99 = percentiles(every * 1000)
        if index == baseline_index:
            ratio, interval, word = 1.0, (1.0, 1.0), "baseline"
        else:
            own, reference = turns[:, index], turns[:, baseline_index]
            ratio = paired_ratio(own, reference)
            interval = ratio_interval(own, reference, generator=generator)
            word = verdict(ratio, interval)
        latencies.append(Latency(p50=p50, p90=p90, p99=p99, ratio_to_baseline=ratio, ratio_ci95=interval, verdict=word))
    return latencies


def turn_times(seconds: Sequence[Sequence[Sequence[Sequence[Sequence[float]]]]], clock: int) -> Array:
    """Return the time of every turn, that of its fastest inference: shape (sessions, files, rounds).

    Args:
        seconds: What the worker gives: [session][file][round][inference of the turn][clock]; turns differ in length
            from session to session.
        clock: `PASSED` or `PROCESSOR`.
    """
    return np.array([[np.array(turns)[..., clock].min(axis=1) for turns in files] for files in seconds])


def _warn_if_busy(threads: int, progress: Progress) -> None:
    """Tell the user when the timing will be disturbed."""
    cores = psutil.cpu_count() or 1
    if threads > cores:
        progress.notice(f"the device profile uses {threads} threads and this machine has {cores}: timings will be off")
        return
    # Not the load average: it still holds what the run itself did a minute ago.
    busy = psutil.cpu_percent(interval=_LOOK_SECONDS) / 100 * cores
    if busy + threads > cores + _TOLERATED_CORES:
        progress.notice("other programs keep the processor busy: latencies will be higher and spread wider")
