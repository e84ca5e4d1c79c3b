"""Runs calibration batches through a graph once and shows chosen values to observers as they are made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.events import Bar
from mil_cli.graph.watch import watched
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.observers import Observer, Statistic
from mil_cli.stages.quantize.ranges import affine_parameters
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.placement import Placement
    from mil_cli.stages.quantize.ranges import CodeRange
    from mil_cli.stages.quantize.settings import QuantizationConfig, Rules

Watcher = TypeVar("Watcher", bound=Observer)


@dataclass(frozen=True)
class Seen(Generic[Watcher]):
    """What calibration showed of the values that get quantizers.

    Attributes:
        values: By value with a quantizer of its own, who watched it.
        narrow: By value that layers read in few bits, who watched it for them.
        codes: By (value, whether in few bits), its codes.
        ranges: Likewise, the range that was found.
    """

    values: dict[Node, Watcher]
    narrow: dict[Node, Watcher]
    codes: dict[tuple[Node, bool], CodeRange]
    ranges: dict[tuple[Node, bool], tuple[float, float]]


@dataclass(frozen=True)
class _Several:
    """Shows one value to several observers, so that one pass over the samples serves all."""

    observers: Sequence[Statistic]

    def update(self, values: Tensor) -> None:
        for observer in self.observers:
            observer.update(values)


def ranged_quantizers(seen: Seen[Watcher]) -> tuple[dict[Node, Quantizer], dict[Node, Quantizer]]:
    """Return how owned values, and those that layers read in fewer bits, are quantized to span what was found."""

    def quantizer(node: Node, *, few: bool) -> Quantizer:
        codes = seen.codes[node, few]
        scale, zero_point = affine_parameters(*seen.ranges[node, few], codes)
        return Quantizer(torch.tensor(scale), torch.tensor(zero_point), codes)

    values = {node: quantizer(node, few=False) for node in seen.values}
    return values, {node: quantizer(node, few=True) for node in seen.narrow}


def place_observed(
    model: Model,
    place: Callable[[Collection[Node]], Placement],
    watcher: Callable[[CodeRange], Watcher],
    rules: Rules,
    config: QuantizationConfig,
    context: Context,
) -> tuple[Placement, Seen[Watcher]]:
    """Decide where quantizers go, and find their ranges; values of which only zeros are seen get none.

    A scale for zeros would clip whatever else comes, such as the states of a later call.

    Args:
        model: The model.
        place: Given the values that must stay float, and their readers with them, decides about the others.
        watcher: Makes an observer for a value with such codes.
        rules: Give the codes.
        config: Says how many calibration samples are looked at.
        context: Gives them.

    Raises:
        StageError: No layer is left to quantize, a pattern of `layers` fits none, or calibration fails.
    """
    known: dict[tuple[Node, CodeRange], Watcher] = {}
    silent: set[Node] = set()
    while True:
        placement = place(silent)
        rules.check_used(placement)
        asked = [(node, False) for node in placement.owned] + [(node, True) for node in placement.narrow]
        codes = {(node, few): rules.values(placement, node, narrow=few) for node, few in asked}
        fresh = {key: watcher(key[1]) for key in dict.fromkeys((node, codes[node, few]) for node, few in asked)}
        fresh = {key: observer for key, observer in fresh.items() if key not in known}
        together: dict[Node, list[Watcher]] = {}
        for (node, _), observer in fresh.items():
            together.setdefault(node, []).append(observer)
        observe(model, {node: _Several(observers) for node, observers in together.items()}, config, context)
        known.update(fresh)
        watchers = {key: known[key[0], codes[key]] for key in asked}
        ranges = {key: observer.range() for key, observer in watchers.items()}
        without = {node for (node, _), found in ranges.items() if found == (0.0, 0.0)}
        if not without:
            if rules.layers:
                context.note(layers=rules.layer_facts(placement))
            values = {node: watchers[node, False] for node in placement.owned}
            narrow = {node: watchers[node, True] for node in placement.narrow}
            return placement, Seen(values, narrow, codes, ranges)
        silent |= without


def observe(model: Model, observers: Mapping[Node, Statistic], config: QuantizationConfig, context: Context) -> None:
    """Show values of a model to their observers in one pass over the stage's calibration samples.

    Raises:
        StageError: There are no samples, or a value is NaN or infinite.
    """
    if not observers:
        return
    with context.progress.work("calibrating", batches_of(model, config, context)) as bar:
        observe_with(model, observers, config, context, bar=bar)


def batches_of(model: Model, config: QuantizationConfig, context: Context) -> int:
    """Return how many batches one pass over the calibration samples has."""
    size = fixed_batch(model) or config.calibration_batch_size
    return min(-(-config.calibration_samples // size), max(len(context.data.train) // size, 1))


def observe_with(
    model: Model, observers: Mapping[Node, Statistic], config: QuantizationConfig, context: Context, *, bar: Bar
) -> None:
    """Do as `observe` does, within a piece of work that has begun; `bar` is told after each batch."""
    batches = context.calibration(
        samples=config.calibration_samples, batch_size=config.calibration_batch_size, model=model
    )
    calibrate(model.graph, observers, batches, bar=bar)


def calibrate(
    graph: GraphModule,
    observers: Mapping[Node, Statistic],
    batches: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    bar: Bar,
) -> int:
    """Show the outputs of some nodes to their observers over all batches; memory does not grow with the batches.

    Args:
        graph: The graph; it is not changed.
        observers: Node of `graph` -> who observes its output.
        batches: The (args, kwargs) of each batch.
        bar: Told after each batch.

    Returns:
        How many batches there were.

    Raises:
        StageError: There are no batches, or a value is NaN or infinite.
    """
    runner = watched(graph, {node: _look(node.name, observer) for node, observer in observers.items()})
    count = 0
    with torch.no_grad():
        for args, kwargs in batches:
            runner(*args, **kwargs)
            count += 1
            bar.advance()
    if not count:
        raise StageError("there are no calibration samples", hint="check the train split and `calibration_samples`")
    return count


def _look(name: str, observer: Statistic) -> Callable[[Tensor], None]:
    def look(value: Tensor) -> None:
        try:
            observer.update(value)
        except ValueError as error:
            raise StageError(
                f"calibration met a bad value at '{name}': {error}",
                hint="the model or its inputs hold NaN or infinity: check the data and the training before this stage",
            ) from error

    return look
