"""Residual branches: the parts of a graph that can be left out, because a shortcut goes around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from mil_cli.graph.branches import branch_path
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name

_ADDITIONS = ("add", "add_")


@dataclass(frozen=True)
class ResidualBranch:
    """What an addition puts on top of a shortcut.

    Attributes:
        addition: Name of the node that adds the two.
        shortcut: Name of the node whose value stays if the branch is left out.
        entry: Name of the node that the branch reads.
        nodes: Names of the calls that run for the branch alone, the addition included.
    """

    addition: str
    shortcut: str
    entry: str
    nodes: frozenset[str]

    def holds(self, other: ResidualBranch) -> bool:
        """Whether another branch lies inside this one, and goes with it."""
        return other.addition != self.addition and other.addition in self.nodes


def residual_chains(graph: GraphModule) -> list[list[ResidualBranch]]:
    """Find the residual branches of a graph, in chains: each branch of a chain reads what the one before it gave.

    A branch begins at one value, ends in one addition, holds a weight, and nothing outside reads anything inside. The
    shortcut may hold layers of its own (a projection); of two such sides the one with fewer weights is the shortcut.
    Between the branches of a chain there may be operators that keep the shape, such as a rectifier or a norm. The
    branches inside a larger one make chains of their own.

    Args:
        graph: A graph in evaluation mode whose nodes know their shapes (``meta["val"]``).

    Returns:
        The chains in order of execution; the branches of a chain in theirs.
    """
    names = {node.name: node for node in graph.graph.nodes}
    ancestors = _Ancestors(graph)
    # What `torch.cond` may skip is the model's own choice.
    ends = [node for node in calls(graph) if not branch_path(node)]
    branches = [branch for node in ends if (branch := _branch_of(graph, node, ancestors)) is not None]
    around = {branch.addition: {other.addition for other in branches if other.holds(branch)} for branch in branches}
    chains: list[list[ResidualBranch]] = []
    open_: dict[Node, list[ResidualBranch]] = {}
    for branch in branches:
        end = names[branch.addition]
        beside = {node: chain for node, chain in open_.items() if around[node.name] == around[end.name]}
        previous = _previous_end(names[branch.entry], beside, end)
        if previous is None:
            chains.append(chain := [])
        else:
            chain = open_.pop(previous)
        chain.append(branch)
        open_[end] = chain
    return chains


def leave_out(graph: Graph, copies: Mapping[str, Node], branches: Sequence[ResidualBranch]) -> None:
    """Let the shortcut take the place of each branch, in place; weights nobody reads and the code are the caller's.

    Args:
        graph: The graph, or a copy of the one that was searched; nodes may have been added since.
        copies: Its nodes by the names that the branches use.
        branches: What to leave out.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    gone: set[Node] = set()
    # The last first: the shortcut of one may be the addition of another that is left out as well.
    for branch in sorted(branches, key=lambda branch: position[copies[branch.addition]], reverse=True):
        addition = copies[branch.addition]
        addition.replace_all_uses_with(copies[branch.shortcut])
        gone.update(copies[name] for name in branch.nodes if name in copies)  # `torch.cond` keeps its nodes to itself
    pending = list(gone)
    while pending:  # what was added to a branch goes with it
        added = set(pending.pop().users) - gone
        gone |= added
        pending.extend(added)
    # Not by looking for dead code: a dropout or an operator in place would pass for alive.
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)


def remove_branches(graph: GraphModule, branches: Sequence[ResidualBranch]) -> None:
    """Take branches out of a graph module in place, with the weights that nothing else reads.

    Args:
        graph: The graph module that was searched, or a cut of it (which keeps the names).
        branches: What to take out.
    """
    before = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    leave_out(graph.graph, {node.name: node for node in graph.graph.nodes}, branches)
    graph.graph.eliminate_dead_code()
    for target in before - {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        owner, _, leaf = target.rpartition(".")
        delattr(graph.get_submodule(owner), leaf)
    graph.graph.lint()
    graph.recompile()


class Shortcuts(Interpreter):
    """Runs a graph as it is, but where a branch joins its shortcut the shortcut alone goes on.

    What `remove_branches` leaves must give the same outputs: this reads no more of a branch than the name of its ends.

    Args:
        graph: The graph with its branches.
        branches: Those without which the outputs are asked for.
    """

    def __init__(self, graph: GraphModule, branches: Iterable[ResidualBranch]) -> None:
        super().__init__(graph)
        self._shortcuts = {branch.addition: branch.shortcut for branch in branches}
        self._nodes = {node.name: node for node in graph.graph.nodes}

    def run_node(self, n: Node) -> Any:
        """Run one node, or pass the shortcut on in its place."""
        if n.name in self._shortcuts:
            return self.env[self._nodes[self._shortcuts[n.name]]]
        return super().run_node(n)


class _Ancestors:
    """The calls that each call depends on, itself included: as bits, since deep graphs have millions of pairs."""

    def __init__(self, graph: GraphModule) -> None:
        self._calls = list(calls(graph))
        self._bits: dict[Node, int] = {}
        for place, node in enumerate(self._calls):
            bits = 1 << place
            for used in node.all_input_nodes:
                bits |= self._bits.get(used, 0)
            self._bits[node] = bits

    def without(self, node: Node, other: Node) -> set[Node]:
        """Return what `node` depends on and `other` does not."""
        bits, found = self._bits.get(node, 0) & ~self._bits.get(other, 0), set()
        while bits:
            lowest = bits & -bits
            found.add(self._calls[lowest.bit_length() - 1])
            bits ^= lowest
        return found


def _branch_of(graph: GraphModule, node: Node, ancestors: _Ancestors) -> ResidualBranch | None:
    if op_name(node) not in _ADDITIONS or len(node.args) != 2 or _shape(node) is None:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node) or get_argument(node, "alpha") != 1:
        return None
    sides = [
        (_weights(graph, inside), shortcut, side, inside, outer)
        for shortcut, side in ((first, second), (second, first))
        if _shape(shortcut) == _shape(node) == _shape(side)
        and (inside := _without_shared_sizes(ancestors.without(side, shortcut), node))
        and len(outer := _outer(inside)) == 1
        and _closed(inside, node)
    ]
    sides = [side for side in sides if side[0] > 0]
    if not sides:
        return None
    _, shortcut, side, inside, outer = max(sides, key=lambda found: found[0])
    entry = next(iter(outer))
    own = _without_shared_sizes(ancestors.without(shortcut, side), node)
    if shortcut is not entry and (_outer(own) != outer or shortcut not in own):
        return None
    # An operator in place would write into the value of the shortcut, which others may read: the caller, if it is an
    # input.
    written = any(op_name(user).endswith("_") for user in node.users)
    if written and (shortcut.op == "placeholder" or set(shortcut.users) - inside != {node}):
        return None
    return ResidualBranch(node.name, shortcut.name, entry.name, frozenset(n.name for n in [*inside, node]))


def _without_shared_sizes(inside: set[Node], end: Node) -> set[Node]:
    """Return some nodes without the sizes that others read too: the batch size is computed where it is first needed."""
    result = set(inside)
    while shared := {
        node
        for node in result
        if not _is_tensor(node)
        and not set(node.users) <= result | {end}
        and not any(used in result for used in node.all_input_nodes)
    }:
        result -= shared
    return result


def _outer(inside: set[Node]) -> set[Node]:
    """Return the tensors that some nodes read from outside, weights apart; reading a size is not reading the tensor."""
    read = {used for node in inside if _is_tensor(node) for used in node.all_input_nodes} - inside
    return {used for used in read if used.op != "get_attr" and _is_tensor(used)}


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, int | torch.SymInt)


def _closed(inside: set[Node], end: Node) -> bool:
    """Whether nothing but the end reads what some nodes make, and none of them writes into what others made."""
    return all(
        set(node.users) <= inside | {end} and (not op_name(node).endswith("_") or node.args[0] in inside)
        for node in inside
    )


def _weights(graph: GraphModule, inside: set[Node]) -> int:
    """Return how many numbers the weights hold that some nodes read."""
    sources = {used for node in inside for used in node.all_input_nodes if used.op == "get_attr"}
    values = [get_attribute(graph, str(source.target)) for source in sources]
    return sum(value.numel() for value in values if isinstance(value, Tensor) and value.ndim > 1)


def _shape(node: Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(str(size) for size in value.shape) if isinstance(value, Tensor) else None


def _previous_end(entry: Node, ends: Mapping[Node, list[ResidualBranch]], end: Node) -> Node | None:
    """Return the end of the branch that a branch follows: behind its entry, through operators that keep the shape."""
    shape = _shape(end)
    step: Node | None = entry
    while step is not None and _shape(step) == shape:
        if step in ends:
            return step
        before = [used for used in step.all_input_nodes if used.op != "get_attr"]
        step = before[0] if len(before) == 1 and step.op == "call_function" else None
    return None
