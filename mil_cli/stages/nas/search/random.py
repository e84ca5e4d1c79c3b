"""Random search, the baseline of all others."""

from __future__ import annotations

from typing import Literal

from mil_cli.spaces.balanced import draw_balanced
from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal

_TRIES = 20
"""Draws for each candidate until those that are seldom met are made up for by others."""


class Random(SearchConfig):
    """Candidates drawn at random within the bounds, all of them at the beginning.

    Li and Talwalkar 2019, "Random search and reproducibility for neural architecture search": what another strategy has
    to beat.

    Attributes:
        balanced: Whether candidates are spread evenly over their operations, where these are bounded: of decisions
            drawn one by one nearly all have about the same.
    """

    strategy: Literal["random"] = "random"
    balanced: bool = True

    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return all that the budget is for."""
        count = int(situation.left)
        found = situation.drawing.first(count)
        if self.balanced and not situation.trials:
            found += _balanced(situation, count - len(found))
        found += situation.drawing.random(count - len(found)) if len(found) < count else []
        return [Proposal(candidate) for candidate in found]


def _balanced(situation: Situation[C], count: int) -> list[C]:
    """Return candidates spread over a bound on operations; none where there is no such bound."""
    space, bounds = situation.space, situation.bounds
    if "macs" not in bounds.most:
        return []
    macs, high = bounds["macs"], bounds.most["macs"]
    low = macs(space.smallest)
    if not low < high:
        return []
    drawn = draw_balanced(
        space, macs, situation.generator, count=count, low=low, high=high, tries=_TRIES, fits=bounds.within
    )
    return situation.drawing.given(drawn, count)
