"""How figures are written for people: units, ratios, changes, durations."""

from __future__ import annotations

import math

NOT_MEASURED = "-"
_MICRO = "\N{MICRO SIGN}"


def significant(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, without an exponent between 0.0001 and a million."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    magnitude = math.floor(math.log10(abs(value)))
    if -5 < magnitude < 6:
        return f"{value:.{max(0, digits - 1 - magnitude)}f}"
    return f"{value:.{digits - 1}e}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    for scale, unit in units:
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}".strip()
    scale, unit = units[-1]
    return f"{significant(value / scale)} {unit}".strip()


def count(value: float | None) -> str:
    """Write a count: ``34.1 M``."""
    if value is None:
        return NOT_MEASURED
    if abs(value) < 1000:
        return str(int(value)) if value == int(value) else significant(value)
    return _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))


def size(value: float | None) -> str:
    """Write bytes in decimal units: ``98.2 kB``."""
    if value is None:
        return NOT_MEASURED
    if abs(value) < 1000:
        return f"{value:g} B"
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def milliseconds(value: float | None) -> str:
    """Write a time that is given in milliseconds: ``0.470 ms``; always in these, so that times compare at a glance."""
    return NOT_MEASURED if value is None else f"{significant(value)} ms"


def joules(value: float | None) -> str:
    """Write an energy: ``3.20 mJ``."""
    return NOT_MEASURED if value is None else _scaled(value, ((1.0, "J"), (1e-3, "mJ"), (1e-6, f"{_MICRO}J")))


def plain(value: float | None, digits: int = 4) -> str:
    """Write a number without a unit."""
    return NOT_MEASURED if value is None else significant(value, digits)


def quality(value: float | None) -> str:
    """Write a metric with four digits behind the point, or four significant ones if it is large."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.4f}" if abs(value) < 10 else significant(value, 4)


def change(value: float) -> str:
    """Write a difference of two metrics with its sign."""
    if value == 0:
        return "0"
    return ("+" if value > 0 else "-") + quality(abs(value))


def percent(value: float, digits: int = 2) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def signed_percent(value: float) -> str:
    """Write a share as a percentage with its sign."""
    return ("+" if value > 0 else "") + percent(value, 1)


def times(ratio: float) -> str:
    """Write a factor: ``4.08x``."""
    return f"{significant(ratio)}x"


def duration(seconds: float) -> str:
    """Write a duration as people say it: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
