"""What stages that make a model smaller share: how a target is written, and what widths end on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mil_cli.device.profile import DeviceProfile
from mil_cli.units import Kept, parse_bytes, parse_drop, parse_kept, parse_seconds


def _checked(value: object) -> object:
    parse_kept(value)
    return value


Target = Annotated[str | float, BeforeValidator(_checked)]
"""What is kept: a ratio of what comes in (``0.3``, ``30%``) or a count (``6M``)."""


def _checked_latency(value: object) -> object:
    parse_latency(value)
    return value


LatencyTarget = Annotated[str | float, BeforeValidator(_checked_latency)]
"""What is kept of a predicted latency: a ratio (``0.3``, ``30%``) or a duration (``2 ms``)."""


def _checked_memory(value: object) -> object:
    parse_memory(value)
    return value


MemoryTarget = Annotated[str | float, BeforeValidator(_checked_memory)]
"""What is kept of an estimated memory: a ratio (``0.3``, ``30%``) or a size (``2 MB``)."""


def _checked_size(value: object) -> object:
    parse_size(value)
    return value


SizeTarget = Annotated[str | float, BeforeValidator(_checked_size)]
"""What is kept of an exported file: a ratio (``0.3``, ``30%``) or a size (``100 kB``)."""

Drop = Annotated[float, BeforeValidator(parse_drop), Field(ge=0)]
"""By what share a quality may get worse (``0.01``, ``1%``)."""

RoundTo = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]
"""Multiple that widths end on; ``auto`` takes the device's."""

Kernels = Literal["float", "int8"]
"""Which of the device's multiples ``auto`` takes: that of float kernels, or of int8 kernels."""


def parse_latency(text: object) -> Kept:
    """Parse a latency to keep: a ratio (``0.3``, ``30%``), or a duration (``2 ms``).

    Raises:
        ValueError: It is neither.
    """
    return _ratio_or(text, parse_seconds, "latency", "a duration such as 2 ms")


def parse_memory(text: object) -> Kept:
    """Parse a memory to keep: a ratio (``0.3``, ``30%``), or a size (``2 MB``).

    Raises:
        ValueError: It is neither.
    """
    return _ratio_or(text, parse_bytes, "memory", "a size such as 2 MB")


def parse_target(quantity: str, text: str | float) -> Kept:
    """Parse how much of a quantity is to be kept: latency and memory have units of their own, the others are counts.

    Raises:
        ValueError: It is neither a ratio nor an amount of the quantity.
    """
    return {"latency": parse_latency, "memory": parse_memory}.get(quantity, parse_kept)(text)


def parse_size(text: object) -> Kept:
    """Parse a file's size to keep: a ratio (``0.3``, ``30%``), or a size (``100 kB``).

    Raises:
        ValueError: It is neither.
    """
    return _ratio_or(text, parse_bytes, "size", "a size such as 100 kB")


def _ratio_or(text: object, parse: Callable[[object], float], what: str, example: str) -> Kept:
    try:
        kept = parse_kept(text)
        if not kept.absolute:  # "2 m" would be two million of something
            return kept
    except ValueError:
        pass
    try:
        amount = parse(text) if isinstance(text, str) else 0.0
    except ValueError:
        amount = 0.0
    if amount <= 0:
        raise ValueError(f"{text!r} is no {what} to keep; write a ratio above 0 and at most 1, or {example}")
    return Kept(amount, absolute=True)


def width_multiple(round_to: RoundTo, kernels: Kernels, device: DeviceProfile) -> int:
    """Return the multiple that widths end on."""
    if round_to != "auto":
        return round_to
    preferred = device.preferred_multiple
    return preferred.int8 if kernels == "int8" else preferred.float
