"""The place of this process among those that ``torchrun`` started for one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A process of a run.

    Attributes:
        rank: Its number, from 0.
        count: How many processes the run has.
    """

    rank: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's folder and measures."""
        return self.rank == 0

    def cache_location(self, location: Path) -> Path:
        """Return this process's own part of a stage cache.

        Training exchanges gradients, so all processes must compute, or find, the same stages: they may neither wait for
        each other's locks nor find what only one of them stored.
        """
        return location if self.count == 1 else location / "processes" / f"{self.rank}-of-{self.count}"


def place() -> Place:
    """Return the place of this process; the only one unless ``torchrun`` started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place(0, 1)
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def part() -> None:
    """End the processes' exchange: what follows the chain is the first one's alone, and must wait for no other."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
