"""Price of a million inferences on a device that is paid by the hour."""

from __future__ import annotations

from mil_cli.device.profile import DeviceProfile
from mil_cli.measure.types import Latency

_MILLION = 1_000_000
_SECONDS_PER_HOUR = 3600


def cost_per_million(latency: Latency, device: DeviceProfile) -> float | None:
    """Return what a million inferences cost, one after the other, in the profile's currency.

    Args:
        latency: The model's latency; its median counts.
        device: Its price per hour; without one the cost is None.
    """
    if device.price_per_hour is None:
        return None
    return device.price_per_hour / _SECONDS_PER_HOUR * (latency.p50 / 1000) * _MILLION
