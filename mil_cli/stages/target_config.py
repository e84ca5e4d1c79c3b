"""The settings that stages share which make a model smaller until one quantity keeps a target."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from mil_cli.stages.recovery import RecoveringConfig
from mil_cli.stages.targets import Kernels, LatencyTarget, MemoryTarget, RoundTo, Target, parse_target
from mil_cli.units import Kept

Quantity = Literal["macs", "params", "channels", "latency", "memory"]


class TargetConfig(RecoveringConfig):
    """Settings of a stage that removes coupled channels, heads or hidden units until a target is kept.

    Attributes:
        macs: Multiply-accumulates to keep, as a ratio of what comes in (``0.3``, ``30%``) or a count (``6M``).
        params: Parameters to keep, likewise.
        latency: Predicted latency to keep, as a ratio or a duration (``2 ms``), by a table of operators that are
            measured on the device; the result then depends on what was measured. A duration is what the whole model
            takes, its median, where `measured` holds; else what its operators add up to.
        memory: Estimated memory to keep, as a ratio or a size (``2 MB``): the bytes of the weights, of the constants
            beside them, and of the largest set of activations that are live at once, for one sample in float. Exactly
            one of the `quantities` is given.
        round_to: Multiple that widths end on; ``auto`` takes the device's.
        multiple: The kernels that the model will run on in the end: int8 for one that is quantized later. They decide
            which of the device's multiples ``auto`` takes, and what a latency is predicted for.
        measured: Whether a choice by predicted latency is corrected by measuring the whole smaller model beside the one
            that came in, until it keeps the target; not where `multiple` is int8, since it is not quantized yet.
    """

    quantities: ClassVar[tuple[Quantity, ...]] = ("macs", "params", "latency", "memory")
    never_after: ClassVar[dict[str, str]] = {
        "quantize": "quantizers are placed and scaled for the widths that they find"
    }

    macs: Target | None = None
    params: Target | None = None
    latency: LatencyTarget | None = None
    memory: MemoryTarget | None = None
    round_to: RoundTo = "auto"
    multiple: Kernels = "float"
    measured: bool = True

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in self.quantities if getattr(self, name) is not None]
        if len(given) != 1:
            shown = " and ".join(given) if given else "none"
            names = f"{', '.join(self.quantities[:-1])} and {self.quantities[-1]}"
            raise ValueError(f"give exactly one of {names}, what is kept of it; {shown} is given")
        return self

    @property
    def quantity(self) -> Quantity:
        """What the target counts."""
        return next(name for name in self.quantities if getattr(self, name) is not None)

    @property
    def kept(self) -> Kept:
        """How much of it is kept."""
        return parse_target(self.quantity, getattr(self, self.quantity))

    @property
    def measures_latency(self) -> bool:
        """Whether a choice by predicted latency is corrected by measuring float models, as the stage has them."""
        return self.measured and self.quantity == "latency" and self.multiple == "float"
