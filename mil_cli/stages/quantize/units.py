"""Which parts of a model are rounded together: single layers, or residual blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import get_attribute
from mil_cli.graph.residual import ResidualBranch, residual_chains
from mil_cli.graph.segment import overwritten, segment
from mil_cli.stages.quantize.layers import Layer
from mil_cli.stages.quantize.passing import after_rectifier


@dataclass(frozen=True)
class Unit:
    """A part of a model whose output is to stay what it was. Nodes go by name: they are the same in copies.

    Attributes:
        entry: The node whose value it reads.
        end: The node that makes its output; a rectifier right behind it belongs to it.
        layers: Names of its quantized layers, as the placement has them.
        channels: Output channels of the last of them.
    """

    entry: str
    end: str
    layers: tuple[str, ...]
    channels: int


def layer_units(graph: GraphModule, layers: Iterable[Layer]) -> list[Unit]:
    """Return one unit for each layer, in order of execution.

    Args:
        graph: The float graph that the layers are of.
        layers: The layers that will be quantized.
    """
    return [_unit(graph, layer.source, after_rectifier(layer.node), [layer]) for layer in layers]


def block_units(graph: GraphModule, layers: Iterable[Layer]) -> list[Unit]:
    """Return one unit for each residual block, and one for each layer outside of them, in order of execution.

    A block is a residual branch that holds no smaller one, with its shortcut.

    Args:
        graph: The float graph that the layers are of; its nodes know their shapes.
        layers: The layers that will be quantized.
    """
    layers = list(layers)
    nodes = {node.name: node for node in graph.graph.nodes}
    written = overwritten(graph)
    free = {layer.node: layer for layer in layers}
    blocks = []
    for branch in _smallest(graph):
        entry, end = nodes[branch.entry], after_rectifier(nodes[branch.addition])
        part = segment(graph, entry, end)
        inside = [free[node] for node in part.nodes if node in free]
        if inside and not written & {*part.inputs, *part.nodes}:
            blocks.append(_unit(graph, entry, end, inside))
            for layer in inside:
                del free[layer.node]
    position = {node.name: number for number, node in enumerate(graph.graph.nodes)}
    return sorted([*blocks, *layer_units(graph, free.values())], key=lambda unit: position[unit.end])


def _smallest(graph: GraphModule) -> list[ResidualBranch]:
    branches = [branch for chain in residual_chains(graph) for branch in chain]
    return [branch for branch in branches if not any(branch.holds(other) for other in branches)]


def _unit(graph: GraphModule, entry: Node, end: Node, layers: list[Layer]) -> Unit:
    last = layers[-1]
    channels = get_attribute(graph, str(last.weight.target)).shape[last.axis]
    return Unit(entry.name, end.name, tuple(layer.name for layer in layers), channels)
