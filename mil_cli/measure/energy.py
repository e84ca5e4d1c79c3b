"""Joules of one inference: by the processor's own counters, else estimated from the profile's watts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from mil_cli.device.profile import DeviceProfile
from mil_cli.measure.process import Feeds, run_job
from mil_cli.measure.types import Latency

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the RAPL counters of Intel and AMD processors."""

SECONDS = 2.0
"""How long inferences are repeated around a reading of the counters, which tick about every millisecond."""


def counters(powercap: Path = POWERCAP) -> list[Path]:
    """Return the folders of the readable energy counters of whole processors.

    Their parts would count twice, and so would the platform as a whole.

    Args:
        powercap: Linux' folder of power counters.
    """
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        files = [folder / "energy_uj", folder / "max_energy_range_uj"]
        if folder.name.count(":") == 1 and not _is_platform(folder) and all(os.access(file, os.R_OK) for file in files):
            found.append(folder)
    return found


def _is_platform(folder: Path) -> bool:
    """Whether a counter is that of the whole machine, which holds what those of its processors count."""
    name = folder / "name"
    return name.is_file() and name.read_text(encoding="ascii").strip() == "psys"


def energy_source(device: DeviceProfile, *, powercap: Path = POWERCAP) -> Literal["counter", "estimate"] | None:
    """Return where energies come from here: a counter, an estimate from the profile's watts, or None."""
    if counters(powercap):
        return "counter"
    return "estimate" if device.watts is not None else None


def can_measure_energy(device: DeviceProfile, *, powercap: Path = POWERCAP) -> bool:
    """Whether there is a figure of energy here, be it an estimate."""
    return energy_source(device, powercap=powercap) is not None


def measure_energy(
    file: Path, *, device: DeviceProfile, feeds: Feeds, latency: Latency, powercap: Path = POWERCAP
) -> float | None:
    """Return the joules of one inference, or None if there is neither a counter nor the profile's watts.

    By counter it is the whole processor's energy while inferences run one after the other, idle power included. An
    estimate is the profile's watts times the median latency.

    Args:
        file: The ONNX file.
        device: Threads, provider and watts.
        feeds: Input name -> array of one sample (batch 1).
        latency: The file's latency.
        powercap: Linux' folder of power counters.

    Raises:
        MeasureError: The runtime failed on the file.
    """
    folders = counters(powercap)
    if folders:
        settings = {"counters": [str(folder) for folder in folders], "seconds": SECONDS}
        return float(run_job("energy", [file], device=device, feeds=feeds, settings=settings))
    return estimated_joules(latency.p50, device.watts)


def estimated_joules(p50_ms: float, watts: float | None) -> float | None:
    """Return watts times the median latency in milliseconds, in joules; None without watts."""
    return None if watts is None else watts * p50_ms / 1000
