"""Copies of a captured graph that are edited, interpreted and cut, but not called: no code is made for them."""

from __future__ import annotations

import copy
import warnings
from types import MethodType
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import PythonCode

from mil_cli.graph.nodes import get_attribute


class Draft(GraphModule):
    """A graph module without code of its own.

    Making the code of thousands of nodes takes several times the memory of everything that an analysis keeps, and a
    good part of the time of a cut.
    """

    def recompile(self) -> PythonCode:
        """Make no code."""
        info = getattr(self.graph._codegen, "pytree_info", None)
        if info is not None:
            self._in_spec = info.in_spec
        return PythonCode("", {}, None, 0)

    def compiled(self) -> GraphModule:
        """Return a graph module with code; it takes over the graph, and the draft must not be used any more."""
        made = GraphModule.__new__(GraphModule)
        made.__dict__.update(self.__dict__)
        made.graph = self.graph
        return made


def draft_of(graph: GraphModule, replaced: dict[int, torch.Tensor] | None = None) -> Draft:
    """Return a draft whose nodes are its own and whose tensors are the original's.

    Args:
        graph: The module to copy.
        replaced: By `id` of a tensor: what the copy holds in its place, wherever it is shared.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*graph.parameters(), *graph.buffers()]}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(graph, str(node.target))
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value
    memo.update(replaced or {})
    original = Draft.__new__(Draft)
    # A module's copy is of the module's class. Methods that the exporter bound to it would copy it once more.
    original.__dict__.update({name: value for name, value in vars(graph).items() if not isinstance(value, MethodType)})
    with warnings.catch_warnings():
        # copying the description of the inputs' tree constructs a class that torch itself has deprecated
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(original, memo)
