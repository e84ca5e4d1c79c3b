"""The settings that all methods of structured pruning share: how much is kept, in how many steps, how widths end."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mil_cli.stages.recovery import RecoveringConfig
from mil_cli.stages.targets import Kernels, LatencyTarget, MemoryTarget, RoundTo, Target, parse_latency, parse_memory
from mil_cli.units import Kept, parse_kept

Quantity = Literal["macs", "params", "channels", "latency", "memory"]


class CutConfig(RecoveringConfig):
    """Settings of a method that makes a model smaller by removing coupled channels, heads or hidden units.

    Attributes:
        macs: Multiply-accumulates to keep, as a ratio of what comes in (``0.3``, ``30%``) or a count (``6M``).
        params: Parameters to keep, likewise.
        latency: Predicted latency to keep, as a ratio or a duration (``2 ms``), by a table of operators that are
            measured on the device; the result then depends on what was measured. A duration is what the whole model
            takes, its median, where `measured` holds; else what its operators add up to.
        memory: Estimated memory to keep, as a ratio or a size (``2 MB``): the bytes of the weights, of the constants
            beside them, and of the largest set of activations that are live at once, for one sample in float. Exactly
            one of the `quantities` is given.
        max_per_layer: Largest part of a layer's width that may be removed, over all steps.
        round_to: Multiple that widths end on; ``auto`` takes the device's.
        independent: Whether every group of a convolution and every attention head keeps the channels that matter most
            in it, as many as the others; otherwise all keep those at the same places.
        multiple: The kernels that the model will run on in the end: int8 for one that is quantized later. They decide
            which of the device's multiples ``auto`` takes, and what a latency is predicted for.
        check_samples: Training samples on which every cut is compared with the uncut model.
        recalibrate_samples: Training samples from which the statistics of batch norms are taken anew after a cut that
            no fine-tuning follows here; 0 leaves them.
        measured: Whether a choice by predicted latency is corrected by measuring the whole cut model beside the one
            that came in, until it keeps the target; not where `multiple` is int8, since it is not quantized yet.
    """

    family: ClassVar[str] = "prune"
    version: ClassVar[int] = 2
    quantities: ClassVar[tuple[Quantity, ...]] = ("macs", "params", "latency", "memory")
    never_after: ClassVar[dict[str, str]] = {
        "quantize": "quantizers are placed and scaled for the widths that they find"
    }

    macs: Target | None = None
    params: Target | None = None
    latency: LatencyTarget | None = None
    memory: MemoryTarget | None = None
    max_per_layer: float = Field(0.8, gt=0, lt=1)
    round_to: RoundTo = "auto"
    multiple: Kernels = "float"
    independent: bool = True
    check_samples: int = Field(16, ge=1)
    recalibrate_samples: int = Field(512, ge=0)
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
        asked = getattr(self, self.quantity)
        parsers = {"latency": parse_latency, "memory": parse_memory}
        return parsers.get(self.quantity, parse_kept)(asked)

    @property
    def measures_latency(self) -> bool:
        """Whether a choice by predicted latency is corrected by measuring float models, as the stage has them."""
        return self.measured and self.quantity == "latency" and self.multiple == "float"


class StructuredPruningConfig(CutConfig):
    """Settings of a method that ranks all classes of a model and cuts the least important ones in rounds.

    Attributes:
        channels: Channels to keep: classes of coupled entries over all spaces that can be cut.
        steps: Rounds of scoring and cutting; each keeps the same ratio of the one before. `recover` fine-tunes between
            them.
        recover_last: Fine-tune after the last step too, where no later stage of the chain does.
        compare_samples: Samples of val on which the first cut is compared with a random one of the same size, before
            anything trains it: what the method is worth shows there. 0 compares nothing.
    """

    quantities: ClassVar[tuple[Quantity, ...]] = ("macs", "params", "channels", "latency", "memory")

    channels: Target | None = None
    steps: int = Field(1, ge=1, le=1000)
    recover_last: bool = False
    compare_samples: int = Field(2000, ge=0)
