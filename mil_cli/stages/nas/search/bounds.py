"""Hard bounds: what a candidate may cost at most, of several things at once; what is above is never scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from mil_cli.stages.nas.search.trial import C


@dataclass(frozen=True)
class Bound(Generic[C]):
    """One thing that candidates cost.

    Attributes:
        name: What it is, such as ``macs``.
        cost: How much of it a candidate has; much cheaper than a score.
        most: How much it may have; infinite where it only is to be known.
    """

    name: str
    cost: Callable[[C], float]
    most: float = math.inf


class Bounds(Generic[C]):
    """All that candidates cost, remembered; bounds that are cheap to tell stand first.

    Args:
        bounds: Each of them.
    """

    def __init__(self, bounds: Sequence[Bound[C]]) -> None:
        self._bounds = tuple(bounds)
        self._known: dict[tuple[str, C], float] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What is known of candidates."""
        return tuple(bound.name for bound in self._bounds)

    @property
    def most(self) -> dict[str, float]:
        """The bounds, by name; without those that are infinite."""
        return {bound.name: bound.most for bound in self._bounds if math.isfinite(bound.most)}

    def __getitem__(self, name: str) -> Callable[[C], float]:
        """Return how much of one thing candidates cost.

        Raises:
            KeyError: There is no such cost.
        """
        bound = next((bound for bound in self._bounds if bound.name == name), None)
        if bound is None:
            raise KeyError(name)
        return lambda candidate: self._cost(bound, candidate)

    def within(self, candidate: C) -> bool:
        """Whether a candidate keeps all bounds."""
        return all(math.isinf(bound.most) or self._cost(bound, candidate) <= bound.most for bound in self._bounds)

    def costs(self, candidate: C) -> dict[str, float]:
        """Return what a candidate costs, by name."""
        return {bound.name: self._cost(bound, candidate) for bound in self._bounds}

    def keep(self, costs: Mapping[str, float]) -> bool:
        """Whether some costs that are known keep all bounds."""
        return all(costs[bound.name] <= bound.most for bound in self._bounds)

    def bounded(self, name: str, most: float) -> Bounds[C]:
        """Return the same bounds but for one, with what is remembered."""
        result = Bounds([replace(one, most=most) if one.name == name else one for one in self._bounds])
        result._known = self._known
        return result

    def _cost(self, bound: Bound[C], candidate: C) -> float:
        key = (bound.name, candidate)
        if key not in self._known:
            self._known[key] = float(bound.cost(candidate))
        return self._known[key]
