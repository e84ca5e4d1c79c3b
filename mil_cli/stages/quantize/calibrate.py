"""Runs calibration batches through a graph once and shows chosen values to observers as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.events import Bar
from mil_cli.graph.watch import watched
from mil_cli.stages.quantize.observers import Observer
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.settings import QuantizationConfig


def observe(model: Model, observers: Mapping[Node, Observer], config: QuantizationConfig, context: Context) -> None:
    """Show values of a model to their observers in one pass over the stage's calibration samples.

    Raises:
        StageError: There are no samples, or a value is NaN or infinite.
    """
    if not observers:
        return
    size = fixed_batch(model) or config.calibration_batch_size
    batches = context.calibration(samples=config.calibration_samples, batch_size=size)
    with context.progress.work("calibrating", -(-config.calibration_samples // size)) as bar:
        calibrate(model.graph, observers, batches, bar=bar)


def calibrate(
    graph: GraphModule,
    observers: Mapping[Node, Observer],
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


def _look(name: str, observer: Observer) -> Callable[[Tensor], None]:
    def look(value: Tensor) -> None:
        try:
            observer.update(value)
        except ValueError as error:
            raise StageError(
                f"calibration met a bad value at '{name}': {error}",
                hint="the model or its inputs hold NaN or infinity: check the data and the training before this stage",
            ) from error

    return look
