"""How two figures of one metric compare."""

from __future__ import annotations


def relative_drop(baseline: float, final: float, *, higher_is_better: bool) -> float:
    """Return by what share of the baseline's value the metric got worse; negative when it got better."""
    worse = baseline - final if higher_is_better else final - baseline
    if worse == 0:
        return 0.0
    return worse / abs(baseline) if baseline else float("inf") * (1 if worse > 0 else -1)
