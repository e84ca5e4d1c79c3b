"""What stages that make a model smaller share: how a target is written, and what widths end on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mil_cli.device.profile import DeviceProfile
from mil_cli.units import parse_kept


def _checked(value: str | float) -> str | float:
    parse_kept(value)
    return value


Target = Annotated[str | float, AfterValidator(_checked)]
"""What is kept: a ratio of what comes in (``0.3``, ``30%``) or a count (``6M``)."""

RoundTo = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]
"""Multiple that widths end on; ``auto`` takes the device's."""

Kernels = Literal["float", "int8"]
"""Which of the device's multiples ``auto`` takes: that of float kernels, or of int8 kernels."""


def width_multiple(round_to: RoundTo, kernels: Kernels, device: DeviceProfile) -> int:
    """Return the multiple that widths end on."""
    if round_to != "auto":
        return round_to
    preferred = device.preferred_multiple
    return preferred.int8 if kernels == "int8" else preferred.float
