"""Which layers gain time on integer kernels, once what converts their inputs and outputs is paid for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch.fx import Node

from mil_cli.graph.coupling import Counter, analyse
from mil_cli.graph.nodes import calls
from mil_cli.measure.operators import Operator, OperatorLister, OperatorTable
from mil_cli.measure.operators.operator import Shape, conversion
from mil_cli.stages.quantize.passing import after_rectifier, origin, readers
from mil_cli.stages.quantize.placement import is_join, join_inputs

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.quantize.placement import Placement


@dataclass(frozen=True)
class Kernel:
    """A call that can run on integers, or in float.

    Attributes:
        name: What it is called; those of one name run alike.
        gain: Seconds that it saves on integers; below 0 if it loses some.
        reads: The values that it must have as integers then.
        gives: The value that it gives as integers then; None: it gives floats in any case.
        follows: Whether it runs on integers just where something that it reads is made of them.
    """

    name: str
    gain: float
    reads: tuple[str, ...]
    gives: str | None
    follows: bool = False


def choose_kernels(
    kernels: Sequence[Kernel], conversions: Mapping[str, float], float_readers: Collection[str]
) -> set[str]:
    """Return the names of those kernels that run on integers when most time is saved.

    A value is converted once if it is made as integers and anyone reads it in float, or the other way round; what is
    not made by any of the kernels is float. Which runs how is decided for all of them together, by an integer
    programme: a layer that loses a little by itself may save two conversions between its neighbours.

    Args:
        kernels: All that have a choice.
        conversions: Value -> the seconds that its conversion takes.
        float_readers: The values that something reads that always runs in float.
    """
    place = {name: number for number, name in enumerate(dict.fromkeys(kernel.name for kernel in kernels))}
    values = dict.fromkeys(value for kernel in kernels for value in (*kernel.reads, kernel.gives) if value is not None)
    costs = np.zeros(len(place) + 2 * len(values))
    to_integers = {value: len(place) + number for number, value in enumerate(values)}
    to_floats = {value: number + len(values) for value, number in to_integers.items()}
    for kernel in kernels:
        costs[place[kernel.name]] -= kernel.gain
    for value in values:
        costs[to_integers[value]] = costs[to_floats[value]] = conversions[value]
    rows = list(_rows(kernels, float_readers, place, to_integers, to_floats))
    matrix = lil_array((len(rows), len(costs)))
    for number, row in enumerate(rows):
        for column, factor in row.items():
            matrix[number, column] = factor
    constraints = LinearConstraint(matrix.tocsc(), ub=np.zeros(len(rows)))
    scale = float(np.abs(costs).max()) or 1.0  # seconds may be fewer than the solver tells from 0
    found = milp(costs / scale, integrality=np.ones(len(costs), np.int64), bounds=Bounds(0, 1), constraints=constraints)
    chosen = np.zeros(len(costs)) if found.x is None else found.x  # all in float is always possible
    return {name for name, number in place.items() if chosen[number] > 0.5}


def _rows(
    kernels: Sequence[Kernel],
    float_readers: Collection[str],
    place: Mapping[str, int],
    to_integers: Mapping[str, int],
    to_floats: Mapping[str, int],
) -> Iterator[dict[int, float]]:
    """Yield the sums, variable -> factor, that must not be above 0: what choices ask for.

    Args:
        kernels: All that have a choice.
        float_readers: The values that something reads that always runs in float.
        place: The variable of each name: whether it runs on integers.
        to_integers: That of each value: whether it is made in float and converted.
        to_floats: Likewise, the other way round.
    """
    maker = {kernel.gives: place[kernel.name] for kernel in kernels if kernel.gives is not None}
    for kernel in kernels:
        own = place[kernel.name]
        made = [maker[value] for value in kernel.reads if value in maker]
        for value in kernel.reads:
            before = maker.get(value)
            if before is None:
                yield {own: 1.0, to_integers[value]: -1.0}
            elif before != own:
                yield {own: 1.0, before: -1.0, to_integers[value]: -1.0}
                yield {before: 1.0, own: -1.0, **({} if kernel.follows else {to_floats[value]: -1.0})}
        if kernel.follows:
            yield {own: 1.0, **dict.fromkeys(made, -1.0)}
    for value, before in maker.items():
        if value in float_readers:
            yield {before: 1.0, to_floats[value]: -1.0}


def gaining_layers(model: Model, placement: Placement, table: OperatorTable) -> set[str]:
    """Return the names of the layers that should run on integers, by what the device's operators take.

    Args:
        model: The float model, batch norms folded, in-place operators replaced.
        placement: Where its quantizers would go if all that can be quantized were.
        table: Times those operators that it does not know.

    Raises:
        ModelError: The graph cannot be analysed.
        MeasureError: The runtime cannot even run an empty model.
    """
    counter = Counter(analyse(model))
    form = table.device.int8.model_copy(update={"policy": placement.policy})
    as_float, as_int8 = (OperatorLister(counter, kind, form).by_call({}) for kind in ("float", "int8"))
    names = {layer.node: layer.name for layer in placement.products}
    sources = {layer.node: [layer.source] for layer in placement.products}
    for node in calls(model.graph):
        if is_join(node) and after_rectifier(node) in placement.exclusive:  # they have no weight, but follow layers
            sources[node] = join_inputs(node)
    reads = {node: list(dict.fromkeys(map(origin, given))) for node, given in sources.items()}
    values = {value: None for given in reads.values() for value in given} | dict.fromkeys(placement.exclusive)
    sizes = _sizes(counter)
    conversions = {value.name: conversion(sizes.get(value.name, 1)) for value in values}
    running = (one for listed in (as_float, as_int8) for operators in listed.values() for one in operators)
    table.measure([*running, *conversions.values()])
    seconds = table.known
    one_way = {name: seconds[operator.key] / 2 for name, operator in conversions.items()}

    def kernel(node: Node, given: Sequence[Node]) -> Kernel:
        before, after = (_seconds(seconds, listed, node) for listed in (as_float, as_int8))
        gives = after_rectifier(node) if after_rectifier(node) in placement.exclusive else None
        if gives is None:  # its operator holds the quantization of what it reads
            after -= sum(one_way[value.name] for value in given)
        name = names.get(node, node.name)
        read = tuple(value.name for value in given)
        return Kernel(name, before - after, read, None if gives is None else gives.name, follows=node not in names)

    kernels = [kernel(node, given) for node, given in reads.items()]
    floats = {value.name for value in values if any(user not in reads for user in readers(value))}
    return choose_kernels(kernels, one_way, floats) & set(names.values())


def _sizes(counter: Counter) -> dict[str, int]:
    """Return by the name of a node how many numbers it gives for one sample; nothing of what does not depend on it."""
    coupling = counter.coupling
    shapes: dict[str, Shape] = {}
    for call in counter.running({}):
        known = {key: shape for key, shape in zip(call.reads, call.inputs, strict=True) if shape is not None}
        shapes.update({**known, **dict(zip(call.gives, call.outputs, strict=True))})
    return {
        node.name: math.prod(shapes[key])
        for node in coupling.graph.graph.nodes
        if (key := coupling.recording.key(node)) in shapes
    }


def _seconds(seconds: Mapping[str, float], listed: Mapping[str, Sequence[Operator]], node: Node) -> float:
    return sum(seconds[operator.key] for operator in listed.get(node.name, ()))
