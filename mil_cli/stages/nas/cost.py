"""What a candidate costs: operations, parameters, or latency from a table; never by building it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from mil_cli.device.profile import DeviceProfile
from mil_cli.events import Progress
from mil_cli.graph.coupling import Counter, Dropped, Removed
from mil_cli.measure.operators import OperatorLister, OperatorTable
from mil_cli.stages.breeding import Candidate
from mil_cli.stages.nas.space import ElasticSpace
from mil_cli.stages.nas.supernet import random_pool
from mil_cli.stages.targets import Kernels

Quantity = Literal["macs", "params", "latency"]

_MEASURED_AHEAD = 300


class CandidateCost:
    """The cost of the candidates of one space. For latencies, most operators are measured as it is made.

    Args:
        space: The space.
        quantity: What is counted.
        kernels: The kernels that a latency is predicted for.
        device: Where latencies are measured; only read for them.
        known: What `table` gave before an interruption.
        progress: Where measuring is reported.

    Raises:
        MeasureError: An operator's latency cannot be measured.
    """

    def __init__(
        self,
        space: ElasticSpace,
        quantity: Quantity,
        *,
        kernels: Kernels,
        device: DeviceProfile,
        known: Mapping[str, float],
        progress: Progress,
    ) -> None:
        self._space = space
        counter = Counter(space.coupling)
        self._table: OperatorTable | None = None
        self._count: Callable[[Removed, Dropped], float]
        match quantity:
            case "macs":
                self._count = counter.macs
            case "params":
                self._count = counter.params
            case "latency":
                lister = OperatorLister(counter, kernels, device.int8.policy)
                self._table = table = OperatorTable(device, known, progress)
                self._count = lambda removed, dropped: table.seconds(lister.operators(removed, dropped))
                # What many candidates need is measured in one go: each go starts a process.
                pool = [space.largest, space.smallest, *random_pool(space, seed=0, size=_MEASURED_AHEAD)]
                parts = [(space.removed(candidate), space.dropped(candidate)) for candidate in pool]
                table.measure(operator for removed, dropped in parts for operator in lister.operators(removed, dropped))
                guessed = lister.approximated()
                if guessed:
                    progress.notice(f"latency is only guessed for {', '.join(guessed)}")

    def __call__(self, candidate: Candidate) -> float:
        """Return the cost of a candidate: a count, or predicted seconds of one inference.

        Raises:
            MeasureError: An operator's latency cannot be measured.
        """
        return self._count(self._space.removed(candidate), self._space.dropped(candidate))

    def table(self) -> dict[str, float]:
        """Return the seconds of the operators measured, by operator; empty if the cost is no latency."""
        return {} if self._table is None else self._table.known
