"""Peak memory of loading and running a model, beyond what the bare runtime takes."""

from __future__ import annotations

import statistics
from pathlib import Path

from mil_cli.device.profile import DeviceProfile
from mil_cli.measure.process import Feeds, run_job

PROCESSES = 5


def measure_memory(file: Path, *, device: DeviceProfile, feeds: Feeds) -> int:
    """Return the peak resident memory of a model, in bytes.

    Each of five fresh processes imports onnxruntime, notes its peak, then loads the file and runs it once: what the
    peak has risen by is the model's. The median of the five is returned.

    Args:
        file: The ONNX file.
        device: Threads and provider.
        feeds: Input name -> array of one sample (batch 1).

    Raises:
        MeasureError: The runtime failed on the file.
    """
    rises = [run_job("memory", [file], device=device, feeds=feeds) for _ in range(PROCESSES)]
    return int(statistics.median(rises))
