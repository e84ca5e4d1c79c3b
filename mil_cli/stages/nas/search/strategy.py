"""What a strategy is: settings that say, given what was scored, what to score next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from pydantic import BaseModel, ConfigDict, Field

from mil_cli.stages.nas.search.bounds import Bounds
from mil_cli.stages.nas.search.drawing import Drawing
from mil_cli.stages.nas.search.trial import C, Proposal, SearchSpace, Trial
from mil_cli.workers import Backend


@dataclass(frozen=True)
class Situation(Generic[C]):
    """What a strategy decides on.

    Attributes:
        space: The space.
        bounds: What all that is scored keeps.
        trials: All that was scored, in order.
        left: How many whole evaluations are left.
        drawing: Draws new candidates within the bounds; its generator belongs to this decision.
    """

    space: SearchSpace[C]
    bounds: Bounds[C]
    trials: Sequence[Trial[C]]
    left: float
    drawing: Drawing[C]

    @property
    def generator(self) -> torch.Generator:
        """Where chance comes from."""
        return self.drawing.generator


class SearchConfig(BaseModel):
    """The settings that all strategies have; subclasses add theirs and say what to score next.

    What they propose follows from the situation alone, so that a search that goes on after a kill does what it would
    have done; and not from `jobs`, so that searches in one process and in several give the same.

    Attributes:
        evaluations: The budget: so many candidates are scored with the whole effort, or more with a part of it each.
        minutes: Time after which nothing more is scored; the result then depends on the machine's speed. None: as long
            as it takes.
        jobs: Candidates that are scored at the same time, each in a process of its own; with one, in this process.
        backend: Where these processes are: on this machine, or ``ray``: in a Ray cluster.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluations: int = Field(200, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    jobs: int = Field(1, ge=1, le=1024)
    backend: Backend = "processes"

    @abstractmethod
    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return what to score next, all at once; nothing ends the search."""

    def scores(self) -> int:
        """Return about how many scores the budget is for."""
        return self.evaluations
