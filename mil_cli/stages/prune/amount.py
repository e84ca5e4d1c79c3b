"""What a target bounds, for any cut of a model: operations, parameters, channels, latency, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from mil_cli.graph.coupling import Counter, Coupling, Dropped, MemoryEstimate, Removed
from mil_cli.measure.operators import OperatorLister, OperatorTable
from mil_cli.stages.measured import WHOLE, latency_seconds
from mil_cli.stages.prune.settings import CutConfig

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class Measure(Protocol):
    """Tells what a cut of one model leaves of a quantity."""

    def __call__(self, removed: Removed, dropped: Dropped = ..., /) -> float:
        """Return what is left without the removed classes, by space, and without the nodes that are dropped."""


class Amount:
    """The quantity of one pruning stage, whatever its model has become.

    A target in seconds means what a whole model takes, which is not what its operators add up to: predictions are then
    scaled so that the model before the stage has what is measured of it.

    Args:
        original: The model before the stage.
        coupling: Its analysis.
        config: The settings.
        context: Gives the device; it is only read for latencies.
        known: What `table` gave before an interruption.

    Raises:
        MeasureError: A latency is the target, and the runtime failed.
    """

    def __init__(
        self,
        original: Model,
        coupling: Coupling,
        config: CutConfig,
        context: Context,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self._config = config
        self._context = context
        operators = {key: seconds for key, seconds in (known or {}).items() if key != WHOLE}
        latency = config.quantity == "latency"
        self._table = OperatorTable(context.device, operators, context.progress) if latency else None
        self._whole, self._scale = (known or {}).get(WHOLE), 1.0
        if config.measures_latency and config.kept.absolute:
            self._whole = latency_seconds(original, context) if self._whole is None else self._whole
            self._scale = self._whole / self.measure(coupling)({})

    def measure(self, coupling: Coupling) -> Measure:
        """Return what tells the quantity of each cut of an analysed model."""
        counter = Counter(coupling)
        table = self._table
        if table is not None:
            lister, scale = self._lister(counter), self._scale
            return lambda removed, dropped=frozenset(): scale * table.seconds(lister.operators(removed, dropped))
        counts: dict[str, Measure] = {
            "macs": counter.macs,
            "params": counter.params,
            "memory": MemoryEstimate(counter),
            "channels": lambda removed, dropped=frozenset(): counter.channels(removed),
        }
        return counts[self._config.quantity]

    def prepare(self, coupling: Coupling, cuts: Iterable[tuple[Removed, Dropped]]) -> None:
        """Measure the operators of some cuts in one go, since each go starts a process; does nothing for counts.

        Raises:
            MeasureError: The runtime cannot even run an empty model.
        """
        if self._table is not None:
            lister = self._lister(Counter(coupling))
            self._table.measure(operator for cut in cuts for operator in lister.operators(*cut))

    def _lister(self, counter: Counter) -> OperatorLister:
        return OperatorLister(counter, self._config.multiple, self._context.device.int8)

    @property
    def table(self) -> dict[str, float]:
        """Seconds of the operators measured, by operator, and of the whole model; empty if it is no latency."""
        whole = {} if self._whole is None else {WHOLE: self._whole}
        return {} if self._table is None else {**self._table.known, **whole}

    @property
    def returns(self) -> int:
        """How many chunks may be tried to be taken back after a choice: each may cost a measurement."""
        return 400 if self._table is None else 20

    def shown(self, value: float) -> str:
        """Return an amount as a user reads it."""
        match self._config.quantity:
            case "latency":
                return f"{1e3 * value:.3g} ms"
            case "memory":
                return f"an estimated {value:,.0f} bytes"
            case counted:
                return f"{value:,.10g} {counted}"
