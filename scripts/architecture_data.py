"""Reads a data set of architectures again: what was chosen, what is known cheaply, and every training by its seed."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mil_cli.assess.ranking import Floats
from mil_cli.spaces import DesignedSpace
from mil_cli.spaces.architecture import Chosen


@dataclass(frozen=True)
class Architectures:
    """A table of `scripts.build_architecture_dataset`.

    Attributes:
        rows: By architecture and seed, its cells by column.
        space: What its architectures are of.
    """

    rows: Mapping[str, Mapping[int, Mapping[str, str]]]
    space: DesignedSpace

    @classmethod
    def read(cls, path: Path, space: DesignedSpace) -> Architectures:
        """Read the CSV file; architectures without a training of the first seed are left out."""
        rows: dict[str, dict[int, dict[str, str]]] = defaultdict(dict)
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                rows[row["id"]][int(row["seed"])] = row
        return cls({name: seeds for name, seeds in rows.items() if 0 in seeds}, space)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def choices(self) -> dict[str, dict[str, Chosen]]:
        """What was chosen in each."""
        return {name: dict(self._chosen(seeds[0])) for name, seeds in self.rows.items()}

    def _chosen(self, row: Mapping[str, str]) -> Iterator[tuple[str, Chosen]]:
        for decision in self.space.decisions:
            if text := row[decision.name]:
                yield decision.name, next(choice for choice in decision.choices if str(choice) == text)

    @cached_property
    def encodings(self) -> Floats:
        """What a predictor reads of the choices, shape (architectures, choices)."""
        return np.stack([self.space.encode(self.space.architecture(one)) for one in self.choices.values()]).astype(
            np.float64
        )

    def column(self, name: str) -> Floats:
        """Return a column of the trainings of the first seed, shape (architectures,); NaN where it is empty."""
        return np.array([_number(seeds[0][name]) for seeds in self.rows.values()])

    @cached_property
    def quality(self) -> Floats:
        """What one training of each reached on val."""
        return self.column("quality")

    def seconds(self, *parts: str, epochs: int | None = None) -> Floats:
        """Return processor seconds of some parts, shape (architectures,), of all epochs or of the first ones."""
        names = [
            f"{part}_cpu_seconds{end}"
            for part in parts
            for end in ([""] if epochs is None else [f"_{number}" for number in range(1, epochs + 1)])
        ]
        return np.sum([self.column(name) for name in names], axis=0)

    @cached_property
    def whole(self) -> Floats:
        """Processor seconds of a whole training of each: capturing, training, and the evaluation of the last epoch."""
        return self.seconds("capture", "training") + self.column(f"validation_cpu_seconds_{self.epochs}")

    @cached_property
    def epochs(self) -> int:
        """Epochs of a whole training."""
        first = next(iter(self.rows.values()))[0]
        return sum(name.startswith("train_loss_") for name in first)

    @cached_property
    def by_seed(self) -> Floats:
        """Qualities of those that have the most seeds, shape (architectures, seeds)."""
        qualities = [[_number(one["quality"]) for one in seeds.values()] for seeds in self.rows.values()]
        most = max(map(len, qualities))
        return np.array([one for one in qualities if len(one) == most])

    def values(self, found: Mapping[str, float | None]) -> Floats:
        """Return values by architecture in the order of the table, shape (architectures,)."""
        return np.array([_value(found.get(name)) for name in self.rows])


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _value(value: float | None) -> float:
    return math.nan if value is None else value
