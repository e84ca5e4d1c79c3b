"""A ranking of architectures: how it is made, what it says, and its form for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from mil_cli.assess.active import Acquisition
from mil_cli.assess.costs import Costs
from mil_cli.assess.prediction import CurvePoint
from mil_cli.assess.predictors.ensemble import AnyPredictor, Ensemble
from mil_cli.assess.ranking import Interval
from mil_cli.files import finite

VERSION = 1


class RankMethod(BaseModel):
    """How a table is ranked, but for the seed.

    Attributes:
        predictor: What predicts the quality of architectures that were not trained; its name alone takes it as it is.
        folds: Parts of the trained architectures, each predicted from the others.
        repeats: How often they are parted anew.
        level: Share of qualities and ranks that intervals are to hold.
        noise: Standard deviation of one architecture's quality between seeds, where it is known.
        refits: Fits to resampled architectures, for the intervals of ranks.
        next: How the next trainings are chosen.
        draws: Resamples of the architectures, for the intervals of tau.
        curve: Numbers of trained architectures at which the predictor is judged, for a learning curve.
        curve_repeats: How often each is judged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    predictor: AnyPredictor = Ensemble()
    folds: int = Field(5, ge=2)
    repeats: int = Field(3, ge=1)
    level: float = Field(0.9, gt=0, lt=1)
    noise: float = Field(0.0, ge=0, allow_inf_nan=False)
    refits: int = Field(20, ge=2)
    draws: int = Field(1000, ge=100)
    next: Acquisition = Acquisition()
    curve: tuple[int, ...] = ()
    curve_repeats: int = Field(10, ge=2)

    @field_validator("predictor", mode="before")
    @classmethod
    def _predictor_by_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


class RankConfig(RankMethod):
    """How a table is ranked.

    Attributes:
        seed: Of all that is drawn.
    """

    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Entry:
    """One architecture of a ranking.

    Attributes:
        id: Its name.
        rank: 1 for the best; equal ones have the same.
        rank_low: The best rank of its interval.
        rank_high: The worst.
        quality: What training reached, the mean where it was trained more than once, or what is predicted; None if
            training collapsed.
        low: The interval of one training's quality; None likewise.
        high: Its upper end.
        source: Where the quality is from.
        next: Its place among the trainings that are recommended next.
        rows: How many rows of the table it was merged from.
        imputed: What is not known of it that a predictor reads.
    """

    id: str
    rank: int
    rank_low: int
    rank_high: int
    quality: float | None
    low: float | None
    high: float | None
    source: Literal["trained", "predicted", "collapsed"]
    next: int | None
    rows: int
    imputed: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """A table's architectures in order, and how far the order is to be trusted.

    Attributes:
        entries: The best first; those whose training collapsed last.
        tau: Agreement of the predictor's order with that of trained architectures that it had not seen.
        coverage: Which share of their qualities its intervals held.
        single: The same agreement of each score and partial training alone; its sign says whether more is better.
        curve: What the predictor ranks after fewer trainings.
        costs: What all that took.
        settings: How the table was ranked.
        higher_is_better: Whether more of the quality is better.
    """

    entries: tuple[Entry, ...]
    tau: Interval
    coverage: float
    single: dict[str, Interval]
    curve: tuple[CurvePoint, ...]
    costs: Costs
    settings: RankConfig
    higher_is_better: bool

    @property
    def recommended(self) -> list[Entry]:
        """What to train next, the most wanted first."""
        return sorted((entry for entry in self.entries if entry.next is not None), key=lambda entry: entry.next or 0)

    @property
    def notices(self) -> list[str]:
        """What the reader must know before the order is believed."""
        found = []
        if not self.tau.low > 0:
            found.append("the predictor's order may be chance: the interval of its tau reaches zero; train some more")
        better = [
            name if tau.value > 0 else f"{name} (the less the better)"
            for name, tau in self.single.items()
            if abs(tau.value) >= self.tau.value
        ]
        if better:
            found.append(f"alone ranks the trained ones as well as the predictor does: {', '.join(better)}")
        if not self.costs.complete:
            found.append("some costs are not known, so that the sum is too low")
        return found


def as_json(ranking: Ranking) -> dict[str, Any]:
    """Return a ranking for programs; what is no number is null."""
    content: dict[str, Any] = {
        "version": VERSION,
        "settings": ranking.settings.model_dump(mode="json"),
        "higher_is_better": ranking.higher_is_better,
        "architectures": [asdict(entry) for entry in ranking.entries],
        "train_next": [entry.id for entry in ranking.recommended],
        "tau": asdict(ranking.tau),
        "coverage": ranking.coverage,
        "tau_of_single_columns": {name: asdict(tau) for name, tau in ranking.single.items()},
        "curve": [asdict(point) for point in ranking.curve],
        "costs": {
            **asdict(ranking.costs),
            "total_cpu": ranking.costs.total("cpu"),
            "total_wall": ranking.costs.total("wall"),
        },
        "notices": ranking.notices,
    }
    cleaned: dict[str, Any] = finite(content)
    return cleaned


def from_json(content: Mapping[str, Any]) -> Ranking:
    """Return the ranking that `as_json` gave.

    Args:
        content: Of version `VERSION`.

    Raises:
        ValueError: It is damaged: a part has values of another kind.
        KeyError: A part is missing.
        TypeError: A part is no list, or no mapping.
        AttributeError: Likewise.
    """
    fields = {
        "entries": content["architectures"],
        "tau": _numbers(content["tau"]),
        "coverage": _number(content["coverage"]),
        "single": {name: _numbers(tau) for name, tau in content["tau_of_single_columns"].items()},
        "curve": [
            {**point, **{name: _numbers(point[name]) for name in ("tau", "regret")}} for point in content["curve"]
        ],
        "costs": {part.name: content["costs"][part.name] for part in fields_of(Costs)},
        "settings": content["settings"],
        "higher_is_better": content["higher_is_better"],
    }
    return TypeAdapter(Ranking).validate_python(fields)


def _numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in content.items()}


def _number(value: Any) -> Any:
    """Return a number for programs as it was: what is null was no number."""
    return math.nan if value is None else value
