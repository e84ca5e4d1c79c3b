"""Scaled dot product attention, with any mask and with grouped queries."""

from __future__ import annotations

import numpy as np

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for


def attention(operation: Operation) -> None:
    """q(..., H, L, E) k(..., Hk, S, E) v(..., Hk, S, Ev) -> (..., H, L, Ev); H / Hk queries share a key."""
    query, key, value = (operation.need(name) for name in ("query", "key", "value"))
    output, rank = operation.output, operation.rank(query)
    if operation.rank(key) != rank or operation.rank(value) != rank:
        raise UnsupportedForm("query, key and value differ in rank")
    operation.link(query, -1, key, -1)
    operation.link(value, -1, output, -1)
    operation.link(query, -2, output, -2)
    operation.link(key, -2, value, -2)
    for axis in range(rank - 2):
        queries, keys = operation.shape(query)[axis], operation.shape(key)[axis]
        operation.link(query, axis, output, axis)
        operation.link(key, axis, value, axis)
        if queries == keys:
            operation.link(query, axis, key, axis)
            operation.link(value, axis, output, axis)
        elif keys > 1:
            heads = np.arange(queries)
            operation.link(query, axis, key, axis, heads, heads // (queries // keys))
            operation.link(output, axis, value, axis, heads, heads // (queries // keys))
    # the scores are normalised over the keys, and a causal mask counts positions
    operation.freeze(key, rank - 2, "attention weights are normalised over the positions")
    if operation.argument("is_causal"):
        operation.freeze(query, rank - 2, "a causal mask counts positions")
    mask = operation.key("attn_mask")
    if mask is not None:
        offset = rank - operation.rank(mask)
        for axis in range(operation.rank(mask) - 1):
            if operation.shape(mask)[axis] == operation.shape(query)[axis + offset]:
                operation.link(mask, axis, query, axis + offset)
        if operation.shape(mask)[-1] == operation.shape(key)[-2]:
            operation.link(mask, -1, key, -2)


RULES: Rules = rules_for(attention, "scaled_dot_product_attention")
