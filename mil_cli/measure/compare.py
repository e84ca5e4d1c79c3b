"""All figures that a file alone can give, for several models that are compared with one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mil_cli.device.profile import DeviceProfile
from mil_cli.events import Progress
from mil_cli.measure.cost import cost_per_million
from mil_cli.measure.energy import measure_energy
from mil_cli.measure.latency import LEAST_ROUNDS, measure_latency
from mil_cli.measure.memory import measure_memory
from mil_cli.measure.process import Feeds
from mil_cli.measure.size import size_bytes, zipped_bytes
from mil_cli.measure.types import Measurement


@dataclass(frozen=True)
class Counts:
    """What is counted on a model's graph and no file can tell.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one sample.
    """

    params: int | None = None
    macs: int | None = None


def compare(
    files: Sequence[Path],
    *,
    device: DeviceProfile,
    feeds: Feeds,
    counts: Sequence[Counts] | None = None,
    baseline_index: int = 0,
    rounds: int = LEAST_ROUNDS,
    sessions: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measure models together: size, latency (interleaved), memory, energy and cost.

    Args:
        files: The ONNX files; all take the same inputs.
        device: The profile to measure on.
        feeds: Input name -> array of one sample (batch 1).
        counts: Parameters and operations of each, where they are known.
        baseline_index: Which file the others are compared with.
        rounds: Rounds with each set of sessions.
        sessions: How often all sessions are rebuilt.
        seed: Seeds the bootstrap.
        progress: Where work is reported.

    Returns:
        One measurement for each file, without quality.

    Raises:
        MeasureError: The runtime failed on a file.
    """
    sizes = [size_bytes(file) for file in files]
    latencies = measure_latency(
        files,
        device=device,
        feeds=feeds,
        baseline_index=baseline_index,
        rounds=rounds,
        sessions=sessions,
        seed=seed,
        progress=progress,
    )
    known = [Counts()] * len(files) if counts is None else counts
    return [
        Measurement(
            params=count.params,
            macs=count.macs,
            size_bytes=size,
            zipped_bytes=zipped_bytes(file),
            latency=latency,
            peak_memory_bytes=measure_memory(file, device=device, feeds=feeds),
            energy_j=measure_energy(file, device=device, feeds=feeds, latency=latency),
            cost_per_million=cost_per_million(latency, device),
        )
        for file, count, size, latency in zip(files, known, sizes, latencies, strict=True)
    ]
