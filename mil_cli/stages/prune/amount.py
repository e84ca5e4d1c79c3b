"""What a target bounds, for any cut of a model: operations, parameters, channels, or latency from a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mil_cli.graph.coupling import Counter, Coupling
from mil_cli.measure.operators import OperatorLister, OperatorTable
from mil_cli.stages.prune.settings import StructuredPruningConfig

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

Measure = Callable[[Mapping[int, set[int]]], float]
"""By space the classes that are removed -> what is left of the quantity."""


class Amount:
    """The quantity of one pruning stage, whatever its model has become.

    Args:
        config: The settings.
        context: Gives the device; it is only read for latencies.
        known: What `table` gave before an interruption.
    """

    def __init__(
        self, config: StructuredPruningConfig, context: Context, known: Mapping[str, float] | None = None
    ) -> None:
        self._config = config
        self._context = context
        self._table = OperatorTable(context.device, known, context.progress) if config.quantity == "latency" else None

    def measure(self, coupling: Coupling) -> Measure:
        """Return what tells the quantity of each cut of an analysed model."""
        counter = Counter(coupling)
        if self._table is not None:
            lister, table = (
                OperatorLister(counter, self._config.multiple, self._context.device.int8.policy),
                self._table,
            )
            return lambda removed: table.seconds(lister.operators(removed, frozenset()))
        counts: dict[str, Measure] = {"macs": counter.macs, "params": counter.params, "channels": counter.channels}
        return counts[self._config.quantity]

    @property
    def table(self) -> dict[str, float]:
        """Seconds of the operators measured, by operator; empty if the quantity is no latency."""
        return {} if self._table is None else self._table.known

    @property
    def returns(self) -> int:
        """How many chunks may be tried to be taken back after a choice: each may cost a measurement."""
        return 400 if self._table is None else 20

    def shown(self, value: float) -> str:
        """Return an amount as a user reads it."""
        return f"{1e3 * value:.3g} ms" if self._table is not None else f"{value:,.10g} {self._config.quantity}"
