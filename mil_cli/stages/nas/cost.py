"""What a candidate costs: operations, parameters, estimated memory, or latency from a table; never by building it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from mil_cli.device.profile import DeviceProfile
from mil_cli.events import Progress
from mil_cli.graph.coupling import Counter, Dropped, MemoryEstimate, Removed
from mil_cli.measure.operators import OperatorLister, OperatorTable
from mil_cli.stages.breeding import Candidate
from mil_cli.stages.measured import WHOLE
from mil_cli.stages.nas.space import ElasticSpace
from mil_cli.stages.nas.supernet import random_pool
from mil_cli.stages.target_config import Quantity
from mil_cli.stages.targets import Kernels

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
        whole: Measures the seconds of the whole model, to which predicted latencies are then scaled: they are not what
            its operators add up to. None: they are.

    Raises:
        MeasureError: An operator's latency cannot be measured.
        ValueError: Channels are asked for, which blocks that are left out have none of.
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
        whole: Callable[[], float] | None = None,
    ) -> None:
        self._space = space
        counters = [Counter(coupling) for coupling in space.couplings]  # by the size of the images
        self._table: OperatorTable | None = None
        self._whole: float | None = None
        self._scale = 1.0
        self._counts: list[Callable[[Removed, Dropped], float]]
        match quantity:
            case "macs":
                self._counts = [counter.macs for counter in counters]
            case "params":
                self._counts = [counter.params for counter in counters]
            case "memory":
                self._counts = [MemoryEstimate(counter) for counter in counters]
            case "channels":
                raise ValueError("candidates leave out blocks: their channels are not counted")
            case "latency":
                listers = [OperatorLister(counter, kernels, device.int8) for counter in counters]
                operators = {key: seconds for key, seconds in known.items() if key != WHOLE}
                self._table = table = OperatorTable(device, operators, progress)
                self._counts = [partial(self._predicted, lister, table) for lister in listers]
                # What many candidates need is measured in one go: each go starts a process.
                pool = [space.largest, space.smallest, *random_pool(space, seed=0, size=_MEASURED_AHEAD)]
                table.measure(
                    operator
                    for one in pool
                    for operator in listers[space.resolution_choice(one)].operators(
                        space.removed(one), space.dropped(one)
                    )
                )
                guessed = listers[0].approximated()
                if guessed:
                    progress.notice(f"latency is only guessed for {', '.join(guessed)}")
                if whole is not None:
                    self._whole = known[WHOLE] if WHOLE in known else whole()
                    self._scale = self._whole / self(space.largest)

    def __call__(self, candidate: Candidate) -> float:
        """Return the cost of a candidate: a count, estimated bytes, or predicted seconds of one inference.

        Raises:
            MeasureError: An operator's latency cannot be measured.
        """
        count = self._counts[self._space.resolution_choice(candidate)]
        return count(self._space.removed(candidate), self._space.dropped(candidate))

    def _predicted(self, lister: OperatorLister, table: OperatorTable, removed: Removed, dropped: Dropped) -> float:
        return self._scale * table.seconds(lister.operators(removed, dropped))

    def table(self) -> dict[str, float]:
        """Return seconds of the operators measured, by operator, and of the whole model; empty if it is no latency."""
        whole = {} if self._whole is None else {WHOLE: self._whole}
        return {} if self._table is None else {**self._table.known, **whole}
