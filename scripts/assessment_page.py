"""The page on what ways to judge architectures are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mil_cli.assess.predictors.pairwise import Pairwise
from mil_cli.assess.predictors.ridge import Ridge
from scripts.architecture_data import Architectures
from scripts.architecture_points import SIZES
from scripts.assessment_figures import (
    DRAWS,
    Figures,
    Selection,
    Way,
    ceiling,
    computed,
    curves,
    learned,
    scores,
    select,
    sizes,
    together,
    worth,
)
from scripts.comparison import Result

_PREDICTORS = {"ridge": Ridge(), "pairwise": Pairwise()}
_COMPUTED = ("few steps", "supernet")
_TRAINED = (4, 8, 12)
_SELECTED = (1, 3, 5)


def figures_of(data: Architectures, results: Mapping[str, Result]) -> tuple[list[Way], list[Figures]]:
    """Return all ways to judge without whole trainings, and the figures of these and of predictors.

    Args:
        data: The data set.
        results: What was computed, by the name of the assessor.
    """
    plain = [*sizes(data), *scores(data), *curves(data)]
    for method, result in results.items():
        plain += computed(data, method, _COMPUTED[not method.startswith("steps")], result)
    by_name = {way.name: way for way in plain}
    ways = [*plain, *(together([by_name[name] for name in names]) for names in _mixes(by_name))]
    return ways, [*(worth(way, data) for way in ways), *_learned(data, by_name)]


def page(
    data: Architectures, ways: Sequence[Way], figures: Sequence[Figures], *, head: Sequence[str], classes: int
) -> list[str]:
    """Return the lines of the page.

    Args:
        data: The data set.
        ways: The ways to judge without whole trainings.
        figures: Of these and of predictors.
        head: Lines below the title.
        classes: Of the task: what guessing reaches is one over it.
    """
    top, low, high = ceiling(data)
    repeated, seeds = data.by_seed.shape
    best, worst = float(np.nanmax(data.quality)), float(np.nanmin(data.quality))
    return [
        "# What ways to judge architectures are worth",
        "",
        *head,
        f"{len(data)} architectures, of {worst:.4f} to {best:.4f} on val; training each once took",
        f"{data.whole.sum() / 60:.0f} minutes of one processor. Trainings of other seeds rank them with a tau of",
        f"{top:.3f} ({low:.3f} to {high:.3f}; {repeated} architectures, {seeds} seeds): the ceiling.",
        "",
        *_verdicts(figures, top, best, 1 / classes),
        *_baseline(figures, top),
        "",
        "![Tau over what each way costs; those that none beats in both are named](assessment.svg)",
        "",
        "## All of them",
        "",
        "Speed: how many times longer training all takes, in processor time, everything counted. Tau: to one training",
        "of each, with its 95 % interval (over architectures; of predictors over draws of those that they learned",
        "from); top: among the best tenth; precision: which share of its ten best belongs to the ten best; regret: by",
        f"how much the one that it thinks best falls short. Predictors: mean of {DRAWS} draws, judged on what they had",
        "not seen.",
        "",
        "| way | kind | speed | tau | of the ceiling | top | precision | regret |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(one, top) for one in sorted(figures, key=lambda one: -one.tau.value)),
        "",
        *_selection(data, ways),
    ]


def _mixes(known: Mapping[str, Way]) -> list[tuple[str, ...]]:
    """Return what is ranked together, as far as it is known."""
    judged = [name for name, way in known.items() if way.kind in _COMPUTED]
    wanted = [(name, "macs") for name in judged]
    wanted += [("steps_40 val", name, "macs") for name in judged if known[name].kind == "supernet"]
    return [names for names in wanted if all(name in known for name in names)]


def _learned(data: Architectures, known: Mapping[str, Way]) -> Iterator[Figures]:
    cheap = [known[name] for name in SIZES]
    read = {"sizes": (cheap, False), "choices, sizes": (cheap, True)}
    for name in dict.fromkeys(way.name.rpartition(" ")[0] for way in known.values() if way.kind in _COMPUTED):
        values = [way for way in known.values() if way.name.rpartition(" ")[0] == name]
        dearest = max(way.seconds for way in values)  # all of them come of the same work
        alike = [Way(way.name, way.kind, way.scores, dearest if way is values[0] else 0.0) for way in values]
        read[f"sizes, {name}"] = ([*cheap, *alike], False)
    for name, predictor in _PREDICTORS.items():
        for what, (ways, encoded) in read.items():
            for trained in _TRAINED:
                if trained < len(data) // 2:
                    title = f"{name} of {trained} trainings; {what}"
                    yield learned(title, predictor, ways, data, trained=trained, encoded=encoded)


def _verdicts(figures: Sequence[Figures], top: float, best: float, chance: float) -> list[str]:
    lines = []
    for speed, loss in ((10, 0.1), (30, 0.2)):
        fitting = [one for one in figures if one.speed >= speed and one.kind not in ("size", "score")]
        if not fitting:
            continue
        one = max(fitting, key=lambda one: one.tau.value)
        share, low, high = (value / top for value in (one.tau.value, one.tau.low, one.tau.high))
        verdict = "met" if share >= 1 - loss else "not met"
        reached = (best - one.regret - chance) / (best - chance)
        lines += [
            f"- At least {speed} times faster than training all, at most {loss:.0%} below the ceiling: {verdict}.",
            f"  The best: {one.name}, {one.speed:.0f} times faster,",
            f"  {share:.1%} of the ceiling ({low:.1%} to {high:.1%}).",
            f"  What it thinks best has {reached:.1%} of the best one's quality above chance.",
        ]
    return lines


def _baseline(figures: Sequence[Figures], top: float) -> list[str]:
    """Say what costs nothing: a way that ranks no better is not worth its time."""
    found = {one.name: one.tau.value / top for one in figures if one.kind == "size"}
    shown = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
    return [f"- What costs nothing reaches of the ceiling: {shown}."]


def _line(one: Figures, top: float) -> str:
    speed = "-" if np.isinf(one.speed) else f"{one.speed:.0f}"
    tau = f"{one.tau.value:.3f} ({one.tau.low:.3f} to {one.tau.high:.3f})"
    return (
        f"| {one.name} | {one.kind} | {speed} | {tau} | {one.tau.value / top:.1%} | {one.top:.2f} |"
        f" {one.precision:.2f} | {one.regret:.4f} |"
    )


def _selection(data: Architectures, ways: Sequence[Way]) -> list[str]:
    bound = float(np.median(data.column("macs")))
    found = [select(way, data, bound=bound, trained=count) for way in ways for count in _SELECTED]
    shown = sorted(found, key=lambda one: -one.speed)[:12]
    return [
        f"## Choosing the best with at most {bound:,.0f} operations",
        "",
        "All within the bound are judged, those thought best are trained whole, the best of these is chosen. Beside",
        "it, how many random ones must be trained so that the best of them is as good on average, and how many",
        "times longer that takes. Those that save most:",
        "",
        "| way | trained | regret | minutes | random trainings | times longer |",
        "|---|---|---|---|---|---|",
        *(_selection_line(one) for one in shown),
    ]


def _selection_line(one: Selection) -> str:
    minutes = one.seconds / 60
    return f"| {one.name} | {one.trained} | {one.regret:.4f} | {minutes:.1f} | {one.random} | {one.speed:.1f} |"
