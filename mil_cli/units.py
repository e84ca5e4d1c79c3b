"""Amounts as users write them: ``0.3``, ``6M``, ``100 kB``, ``2 ms``, ``1%``; parsed into plain numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_JOULES = {"uj": 1e-6, "mj": 1e-3, "j": 1.0}
_NUMBER = re.compile(r"^\s*([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+)\s*([a-zA-Zµ%]*)\s*$")


def _parse(text: object, units: dict[str, float], kind: str) -> float:
    if isinstance(text, bool) or (isinstance(text, float) and math.isnan(text)):  # no bound would refuse it
        raise ValueError(f"{text!r} is not {kind}")
    if isinstance(text, int | float):
        return float(text)
    match = _NUMBER.match(str(text))
    if match is None or match.group(2).lower() not in units:
        shown = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{text!r} is not {kind}; write a number, with one of the units {shown}")
    return float(match.group(1)) * units[match.group(2).lower()]


def parse_count(text: object) -> float:
    """Parse a count such as ``6M`` or ``1.5k`` (decimal prefixes); a plain number stays itself."""
    return _parse(text, _DECIMAL, "a count")


def parse_bytes(text: object) -> float:
    """Parse a size such as ``100 kB`` or ``1 MiB`` into bytes; a plain number is bytes."""
    return _parse(text, {"": 1.0, **_BYTES}, "a size")


def parse_seconds(text: object) -> float:
    """Parse a duration such as ``2 ms`` into seconds; a plain number is seconds."""
    return _parse(text, {"": 1.0, **_SECONDS}, "a duration")


def parse_joules(text: object) -> float:
    """Parse an energy such as ``3 mJ`` into joules; a plain number is joules."""
    return _parse(text, {"": 1.0, **_JOULES}, "an energy")


def parse_ratio(text: object) -> float:
    """Parse a ratio such as ``0.25`` or ``25%``; a plain number stays itself."""
    return _parse(text, {"": 1.0, "%": 0.01}, "a ratio")


def parse_drop(text: object) -> float:
    """Parse the share by which a quality may drop, such as ``1%``; below 1."""
    value = parse_ratio(text)
    if value >= 1:
        raise ValueError(f"{text!r} is a drop of 100 % or more, which anything meets; write a share such as 1%")
    return value


@dataclass(frozen=True)
class Kept:
    """How much of something a stage keeps: a ratio of what it got, or an absolute count."""

    value: float
    absolute: bool

    def resolve(self, original: float) -> float:
        """Return the absolute target for something that measures `original` now."""
        return self.value if self.absolute else self.value * original


def parse_kept(text: object) -> Kept:
    """Parse a target: ``0.3`` or ``30%`` is the ratio kept (above 0, at most 1), ``6M`` an absolute count."""
    if isinstance(text, str) and re.search(r"[kKmMgGtT]\s*$", text):
        value = parse_count(text)
        if value <= 0:
            raise ValueError(f"{text!r} keeps nothing; write a count above 0")
        return Kept(value, absolute=True)
    value = parse_ratio(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} is not what is kept; write a ratio above 0 and at most 1, or a count such as 6M")
    return Kept(value, absolute=False)
