"""The settings that all methods of structured pruning share: how much is kept, in how many steps, how widths end."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from mil_cli.stages.target_config import Quantity, TargetConfig
from mil_cli.stages.targets import Target


class CutConfig(TargetConfig):
    """Settings of a method that makes a model smaller by removing coupled channels, heads or hidden units.

    Attributes:
        max_per_layer: Largest part of a layer's width that may be removed, over all steps.
        independent: Whether every group of a convolution and every attention head keeps the channels that matter most
            in it, as many as the others; otherwise all keep those at the same places.
        check_samples: Training samples on which every cut is compared with the uncut model.
        recalibrate_samples: Training samples from which the statistics of batch norms are taken anew after a cut that
            no fine-tuning follows here; 0 leaves them.
    """

    family: ClassVar[str] = "prune"
    version: ClassVar[int] = 2

    max_per_layer: float = Field(0.8, gt=0, lt=1)
    independent: bool = True
    check_samples: int = Field(16, ge=1)
    recalibrate_samples: int = Field(512, ge=0)


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

    @model_validator(mode="after")
    def _recovers_by_a_stage(self) -> Self:
        if self.recover_last and self.recover is None:
            raise ValueError("recover_last needs recover, the key of the stage that fine-tunes")
        return self
