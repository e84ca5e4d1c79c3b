"""What each op does to the axes of its tensors: one table of rules, and the relations of a whole graph."""

from __future__ import annotations

from types import MappingProxyType

from torch.fx import Node

from mil_cli.graph.coupling.operators import operator_name
from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.relations import (
    attention,
    branches,
    contraction,
    convolution,
    indexing,
    norm,
    pointwise,
    recurrent,
    reduction,
    spatial,
    spectral,
    views,
)
from mil_cli.graph.coupling.table import Operation, RelationTable, Rule, Rules, UnsupportedForm

RULES: Rules = MappingProxyType(
    {
        **pointwise.RULES,
        **views.RULES,
        **contraction.RULES,
        **convolution.RULES,
        **norm.RULES,
        **attention.RULES,
        **recurrent.RULES,
        **reduction.RULES,
        **spatial.RULES,
        **spectral.RULES,
        **indexing.RULES,
        **branches.RULES,
    }
)
"""Op name -> rule; pointwise ops are recognised besides."""

CREATION = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "randn",
        "rand",
        "zeros_like",
        "ones_like",
        "full_like",
    ]
)
"""Ops that make a uniform tensor, so that any size of it is as good."""

SIZES = frozenset(
    [
        "sym_size",
        "sym_numel",
        "sym_stride",
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "item",
        "_local_scalar_dense",
    ]
)
"""Ops that give or check numbers, not tensors."""


def relate(recording: Recording) -> RelationTable:
    """Return all relations between the axes of the tensors of a recorded graph.

    Nodes whose op is unknown, or known in another form only, freeze every axis that they touch and are listed.
    """
    table = RelationTable(recording, dict(recording.shapes))
    for node in recording.graph.graph.nodes:
        _relate_node(node, table)
    return table


def _relate_node(node: Node, table: RelationTable) -> None:
    name = operator_name(node)
    if node.op in ("get_attr", "call_module", "call_method") or name == "getitem" or name in SIZES:
        return
    if isinstance(table.recording.values.get(node.name), int | float | bool):
        return
    operation = Operation(node, table)
    if node.op == "placeholder":
        operation.freeze_all(operation.outputs, "an input of the model")
    elif node.op == "output":
        operation.freeze_all(operation.inputs, "an output of the model")
    elif name in CREATION and not name.endswith("_like"):
        return  # the size argument is rewritten to whatever the users of the tensor need
    elif not operation.inputs:
        operation.freeze_all(operation.outputs, f"{name} makes the tensor from its size")
    else:
        _apply(operation, table)


def _apply(operation: Operation, table: RelationTable) -> None:
    rule: Rule | None = RULES.get(operation.name)
    if rule is None and pointwise.is_pointwise(operation.node, operation.name):
        rule = pointwise.pointwise
    if rule is None:
        reason = f"no rule for the operator {operation.name}"
    else:
        try:
            rule(operation)
            return
        except UnsupportedForm as error:
            reason = f"{operation.name}: {error}"
    table.unknown.append((operation.node, reason))
    operation.freeze_all([*operation.inputs, *operation.outputs], reason)
