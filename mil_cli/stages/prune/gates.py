"""Hard-concrete gates on the classes of a model while it trains: part of its graph, so that they are saved as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.graph.coupling import Coupling
from mil_cli.graph.coupling.readers import scaling_members
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute, has_attribute, set_attribute
from mil_cli.ops.hard_concrete import hard_concrete

_OWNER = "gates"


@dataclass(frozen=True)
class Gates:
    """Where the gates of one graph are.

    Attributes:
        owner: The submodule that holds all that belongs to them.
        count: How many there are.
        places: By space and class, all in one row: the place of its gate; `count` for a class without one.
        factors: By parameter: the axes that gates lie on, each with the place of each index's gate, likewise.
    """

    owner: str
    count: int
    places: Tensor
    factors: Mapping[str, list[tuple[int, Tensor]]]

    @property
    def log_odds(self) -> str:
        """Name of the parameter that the gates are drawn by."""
        return f"{self.owner}.log_odds"

    def by_class(self, values: Tensor) -> Tensor:
        """Return for each class of each space what its gate has, 1 for a class without one."""
        return torch.cat([values, values.new_ones(1)])[self.places.to(values.device)]


def place_gates(graph: GraphModule, coupling: Coupling) -> Gates:
    """Give a gate to each class that can be cut and has weights to scale; the graph is not changed.

    Args:
        graph: The analysed graph.
        coupling: Its analysis.
    """
    owner = _OWNER
    while has_attribute(graph, owner):
        owner += "_"
    names = {name for name, _ in graph.named_parameters()}
    rows: list[Tensor] = []
    chosen: dict[str, list[tuple[int, Tensor]]] = {}
    count = 0
    for space in coupling.spaces:
        places = torch.full((space.size + 1,), -1)  # the last entry stands for no class
        members = scaling_members(coupling, space) if space.free else []
        known = [(name, member) for member in members for name in member.names if name in names]
        if known:
            places[list(space.free)] = torch.arange(count, count + len(space.free))
            count += len(space.free)
        for name, member in known:
            chosen.setdefault(name, []).append((member.axis, places[torch.as_tensor(member.classes).long()]))
        rows.append(places[:-1])
    row = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    factors = {name: [(axis, _or(places, count)) for axis, places in parts] for name, parts in chosen.items()}
    return Gates(owner, count, _or(row, count), factors)


def _or(places: Tensor, none: int) -> Tensor:
    return torch.where(places < 0, none, places)


def insert_gates(graph: GraphModule, gates: Gates, *, start: float) -> None:
    """Multiply weights by their gates, in place.

    Args:
        graph: The graph that they were placed in.
        gates: The gates.
        start: The log-odds that all start with.
    """
    nodes = graph.graph
    set_attribute(graph, gates.log_odds, nn.Parameter(torch.full((gates.count,), start)))
    with nodes.inserting_after(nodes.find_nodes(op="placeholder")[-1]):
        odds = nodes.get_attr(gates.log_odds)
    with nodes.inserting_after(odds):
        drawn = nodes.call_function(torch.ops.mil.hard_concrete.default, (odds, False))
    with nodes.inserting_after(drawn):
        padded = nodes.call_function(torch.ops.aten.constant_pad_nd.default, (drawn, [0, 1], 1.0))
    for number, (name, factors) in enumerate(gates.factors.items()):
        weight = get_attribute(graph, name)
        paths = [f"{gates.owner}.places_{number}_{position}" for position in range(len(factors))]
        for path, (_, places) in zip(paths, factors, strict=True):
            set_attribute(graph, path, places)
        sources = nodes.find_nodes(op="get_attr")
        for node in [each for each in sources if each.users and get_attribute(graph, str(each.target)) is weight]:
            users, value = list(node.users), node
            with nodes.inserting_before(min(users)):
                for path, (axis, _) in zip(paths, factors, strict=True):
                    value = _multiplied(graph, value, padded, path, _shape(weight, axis))
            value.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, value)
    nodes.lint()
    graph.recompile()


def _multiplied(graph: GraphModule, value: Node, padded: Node, path: str, shape: list[int]) -> Node:
    places = graph.graph.get_attr(path)
    factor = graph.graph.call_function(torch.ops.aten.index_select.default, (padded, 0, places))
    factor = graph.graph.call_function(torch.ops.aten.view.default, (factor, shape))
    return graph.graph.call_function(torch.ops.aten.mul.Tensor, (value, factor))


def _shape(weight: Tensor, axis: int) -> list[int]:
    return [-1 if dimension == axis else 1 for dimension in range(weight.ndim)]


@torch.no_grad()
def fold_gates(trained: Model, model: Model, gates: Gates) -> tuple[Model, Tensor]:
    """Return a model without gates whose weights are those of a gated one times its gates, as they are in evaluation.

    Args:
        trained: The gated model.
        model: The model before gates were inserted; not changed.
        gates: The gates.

    Returns:
        The model, and the log-odds of each gate.
    """
    odds: Tensor = get_attribute(trained.graph, gates.log_odds).detach().cpu()
    values = nn.functional.pad(hard_concrete(odds, False), (0, 1), value=1.0)
    state = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith(f"{gates.owner}.")}
    folded = model.clone().eval()
    folded.load_state_dict(state)
    for name, factors in gates.factors.items():
        weight = get_attribute(folded.graph, name)
        for axis, places in factors:
            weight.mul_(values[places].reshape(_shape(weight, axis)).to(weight.device))
    return folded, odds
