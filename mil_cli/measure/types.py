"""The figures of one model on one device, in the form of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latency of one sample, and how it compares with the baseline's.

    Attributes:
        p50: Median, in milliseconds.
        p90: 90th percentile, in milliseconds.
        p99: 99th percentile, in milliseconds.
        ratio_to_baseline: Paired ratio of this to the baseline: below 1 is faster.
        ratio_ci95: The ratio's bootstrap confidence interval.
        verdict: ``baseline``, ``faster``, ``slower`` or ``no real difference``.
    """

    p50: float
    p90: float
    p99: float
    ratio_to_baseline: float
    ratio_ci95: tuple[float, float]
    verdict: str

    @property
    def throughput_per_s(self) -> float:
        """Samples per second, one after the other."""
        return 1000.0 / self.p50

    def to_json(self) -> dict[str, Any]:
        """Return the report's ``latency_ms``."""
        return {
            "p50": self.p50,
            "p90": self.p90,
            "p99": self.p99,
            "ratio_to_baseline": self.ratio_to_baseline,
            "ratio_ci95": list(self.ratio_ci95),
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a file and a graph tell of one model; None is what was not measured.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one sample.
        size_bytes: Bytes of the files that ship.
        zipped_bytes: What they take when they are zipped.
        latency: Latency of one sample.
        peak_memory_bytes: Peak memory of loading and running, beyond the bare runtime's.
        energy_j: Joules of one inference.
        cost_per_million: Price of a million inferences, in the device profile's currency.
    """

    params: int | None = None
    macs: int | None = None
    size_bytes: int | None = None
    zipped_bytes: int | None = None
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    energy_j: float | None = None
    cost_per_million: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as the report holds it; the quality is for who has scored the model to fill in."""
        return {
            "quality": None,
            "params": self.params,
            "macs": self.macs,
            "size_bytes": self.size_bytes,
            "zipped_bytes": self.zipped_bytes,
            "latency_ms": None if self.latency is None else self.latency.to_json(),
            "throughput_per_s": None if self.latency is None else self.latency.throughput_per_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "energy_j": self.energy_j,
            "cost_per_million": self.cost_per_million,
        }
