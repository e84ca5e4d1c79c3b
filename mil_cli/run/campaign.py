"""The work behind a ranking of a space: which architectures, what is computed of each, which of them are trained."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mil_cli.assess.active import next_trainings
from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.prediction import FEWEST
from mil_cli.assess.scores.registry import SIZES
from mil_cli.assess.table import Cell, Table, table_of
from mil_cli.errors import DataError, ModelError
from mil_cli.events import Bar, Progress
from mil_cli.recipe.rank import SpaceRanking
from mil_cli.run.architectures import Clocks, Workplace
from mil_cli.run.cache import Cache
from mil_cli.run.parts import FEWEST_EPOCHS, Job, Kept, Part, Result, compute_all, origin_of
from mil_cli.spaces import Architecture, CostCounter
from mil_cli.spaces.balanced import draw_balanced
from mil_cli.stages.surroundings import fingerprint_of
from mil_cli.training.config import TrainerConfig

if TYPE_CHECKING:
    from mil_cli.recipe.schema import Recipe

_ID_LENGTH = 10
"""Hexadecimal digits of an architecture's name."""
_CLOCKS = ("cpu_seconds", "wall_seconds")


@dataclass(frozen=True)
class Candidate:
    """An architecture that was drawn.

    Attributes:
        name: Follows from its choices.
        architecture: Its choices.
        sizes: ``macs`` and ``params``.
    """

    name: str
    architecture: Architecture
    sizes: Mapping[str, int]


@dataclass
class Campaign:
    """Assesses and trains the architectures of a space.

    Attributes:
        recipe: Space, data, task, trainer and seed.
        settings: How many, and what is computed of each.
        candidates: The architectures.
        decisions: The names of the space's decisions.
        higher_is_better: Of the quality.
        drawing: Seconds that the drawing took, by clock.
        kept: What is known of them.
        progress: Where work is reported.
        results: By the name of the part, what it gave of each architecture, by name.
    """

    recipe: Recipe
    settings: SpaceRanking
    candidates: Sequence[Candidate]
    decisions: tuple[str, ...]
    higher_is_better: bool
    drawing: Mapping[str, float]
    kept: Kept
    progress: Progress
    results: dict[str, dict[str, Result]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, recipe: Recipe, settings: SpaceRanking, *, cache: Cache, fresh: bool, progress: Progress
    ) -> Campaign:
        """Draw the architectures; the recipe's folder must be importable.

        Raises:
            MilError: Data or model cannot be built, the model holds no choice or does not take the images of partial
                trainings, or the range holds too few.
        """
        began = Clocks.now()
        place = Workplace.of(recipe)
        if settings.partial is not None and settings.partial.resolution < 1:
            for end in (place.space.smallest, place.space.largest):
                place.check_resolution(place.build(end, seed=recipe.seed), settings.partial.resolution)
        candidates = _drawn(place, settings, seed=recipe.seed)
        return cls(
            recipe=recipe,
            settings=settings,
            candidates=candidates,
            decisions=tuple(decision.name for decision in place.space.decisions),
            higher_is_better=place.task.higher_is_better,
            drawing=began.until(Clocks.now()),
            kept=Kept(cache, origin_of(recipe, place), fresh),
            progress=progress,
        )

    @property
    def choices(self) -> dict[str, dict[str, str | int]]:
        """The choices of each architecture by its name."""
        return {one.name: one.architecture.to_json() for one in self.candidates}

    def carry_out(self) -> Table:
        """Assess all, train as many as the settings say, and return the table.

        Raises:
            MilError: An architecture cannot be computed, or too few trainings came to an end.
        """
        parts = self._cheap
        if parts:
            with self.progress.work("assessing", len(self.candidates)) as bar:
                self._compute(self.candidates, parts, bar)
        with self.progress.work("whole trainings", self.settings.train) as bar:
            chosen = self._first()
            while chosen:
                self._compute([self.candidates[row] for row in chosen], (self._whole,), bar)
                table = self.table()
                _check_trained(table)
                chosen = self._next(table)
        if table.known.sum() < FEWEST:
            trained, ended = int(table.trained.sum()), int(table.known.sum())
            hint = f"lower trainer.learning_rate, or raise rank.train until {FEWEST} come to an end"
            raise DataError(f"only {ended} of {trained} trainings did not collapse", where="trainer", hint=hint)
        return table

    def _first(self) -> list[int]:
        """Return the rows to train before a predictor chooses: from the cheapest to the dearest, at even distances."""
        order = sorted(range(len(self.candidates)), key=lambda row: self.candidates[row].sizes["macs"])
        step = (len(order) - 1) / (self.settings.first - 1)
        return [order[round(place * step)] for place in range(self.settings.first)]

    def _next(self, table: Table) -> list[int]:
        """Return the rows to train next; none when all trainings are done."""
        trained = int(table.trained.sum())
        acquisition = self.settings.next
        batch = min(acquisition.batch, self.settings.train - trained)
        if batch == 0:
            return []
        return next_trainings(
            self.settings.predictor,
            table.inputs,
            table.goodness,
            acquisition.model_copy(update={"batch": batch}),
            seed=self.recipe.seed + trained,
            excluded=table.trained,
            progress=self.progress,
        )

    def table(self) -> Table:
        """Return the table of what is known so far; its rows are the candidates in their order."""
        return table_of([(one.name, self._record(one)) for one in self.candidates], self._columns)

    # Parts.

    @cached_property
    def _cheap(self) -> tuple[Part, ...]:
        scores = tuple(Part(name) for name in self.settings.scores)
        partial = self.settings.partial
        if partial is None:
            return scores
        fixed = {"epochs": partial.epochs, "early_stopping": None}  # curves are compared, so they are of one length
        trainer = TrainerConfig.model_validate(self.recipe.trainer.merged({**partial.trainer, **fixed}))
        foretells = self.recipe.trainer.epochs
        return (*scores, Part("partial", trainer, partial.samples, foretells, partial.resolution))

    @cached_property
    def _whole(self) -> Part:
        return Part("training", self.recipe.trainer)

    def _compute(self, candidates: Sequence[Candidate], parts: Sequence[Part], bar: Bar) -> None:
        """Let all of the parts be known of the candidates."""
        jobs = []
        for one in candidates:
            whole = Job(one.architecture, tuple(parts), self.recipe.seed)
            missing = tuple(part for part in parts if not self._find(one, whole, part))
            if missing:
                jobs.append(Job(one.architecture, missing, self.recipe.seed))
            else:
                bar.advance()
        names = {one.architecture: one.name for one in candidates}
        for job, results in compute_all(self.recipe, jobs, processes=self.settings.jobs, progress=self.progress):
            for part, result in zip(job.parts, results, strict=True):
                self.kept.store(job, part, result)
                self.results.setdefault(part.name, {})[names[job.architecture]] = result
            bar.advance(note=names[job.architecture])

    def _find(self, candidate: Candidate, job: Job, part: Part) -> bool:
        known = self.kept.find(job, part)
        if known is not None:
            self.results.setdefault(part.name, {})[candidate.name] = known
        return known is not None

    # The table.

    @cached_property
    def _columns(self) -> Columns:
        partial = self.settings.partial
        foretold = () if partial is None else ("val", "sum_of_losses")
        if partial is not None and partial.epochs >= FEWEST_EPOCHS:
            foretold = (*foretold, "extrapolated")
        seconds = {
            clock: Seconds(
                scores=(f"scores_{clock}",),
                partial=(f"partial_{clock}",) if partial is not None else (),
                training=(f"training_{clock}",),
            )
            for clock in _CLOCKS
        }
        columns = {"scores": (*SIZES, *self.settings.scores), "partial": foretold}
        own = {"id", "quality", *columns["scores"], *foretold}
        own |= {name for one in seconds.values() for name in one.all}
        if taken := sorted(own & set(self.decisions)):
            hint = "give the attribute of the module that holds the choice another name"
            raise ModelError(
                "a decision has the name of a column of the table", where="model", value=taken[0], hint=hint
            )
        return Columns(categories=self.decisions, **columns, **seconds, higher_is_better=self.higher_is_better)

    def _record(self, candidate: Candidate) -> dict[str, Cell]:
        record: dict[str, Cell] = dict.fromkeys(self._columns.all)
        record |= {"id": candidate.name, **candidate.architecture, **candidate.sizes}
        found = {part: results.get(candidate.name) for part, results in self.results.items()}
        for clock in _CLOCKS:
            spent = [one[clock] for part, one in found.items() if one is not None and part in self.settings.scores]
            record[f"scores_{clock}"] = math.fsum([self.drawing[clock] / len(self.candidates), *spent])
        for part in ("partial", "training"):
            result = found.get(part)
            if result is not None:
                record |= {f"{part}_{clock}": result[clock] for clock in _CLOCKS}
                record |= {name: value for name, value in result.items() if name not in _CLOCKS}
        record |= {name: one["value"] for name in self.settings.scores if (one := found.get(name)) is not None}
        if found.get("training") is not None and record["quality"] is None:
            record["quality"] = math.nan  # an empty cell would say that there was no training
        return record


def _drawn(place: Workplace, settings: SpaceRanking, *, seed: int) -> list[Candidate]:
    args, kwargs = place.task.inputs(next(iter(place.data.train.batches(1))))
    costs = CostCounter(place.space, args, kwargs)
    macs = functools.cache(costs.macs)  # of a small space the same ones are drawn again and again
    if settings.macs is not None:
        low, high = settings.macs
    else:
        low, high = macs(place.space.smallest), macs(place.space.largest) + 1
    drawn = draw_balanced(
        place.space,
        lambda one: math.log(max(1, macs(one))),
        torch.Generator().manual_seed(seed),
        count=settings.architectures,
        low=math.log(max(1, low)),
        high=math.log(high),
    )
    if len(drawn) < settings.architectures:
        raise ModelError(
            f"{len(drawn)} different architectures of {low:,.0f} to {high:,.0f} operations were met",
            where="rank.architectures" if settings.macs is None else "rank.macs",
            value=settings.architectures if settings.macs is None else settings.macs,
            hint=f"ask for at most {len(drawn)}, or widen the range" if drawn else "widen the range",
        )
    return [
        Candidate(fingerprint_of(one.to_json())[:_ID_LENGTH], one, {"macs": macs(one), "params": costs.params(one)})
        for one in drawn
    ]


def _check_trained(table: Table) -> None:
    trained = int(table.trained.sum())
    if trained >= FEWEST and not table.known.any():
        hint = "lower trainer.learning_rate, or set trainer.gradient_clip: 1.0"
        raise DataError(f"all {trained} trainings collapsed", where="trainer", hint=hint)
