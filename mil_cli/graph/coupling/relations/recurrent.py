"""LSTM, GRU and plain recurrent layers: many layers, both directions."""

from __future__ import annotations

import numpy as np

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

_GATES = {"lstm": 4, "gru": 3}


def recurrent(operation: Operation) -> None:
    """Weights hold gates x hidden rows; hidden units are the same in every gate and in the recurrent columns.

    All layers and directions of one call share the initial state's last axis, so their hidden sizes go together.
    """
    if not operation.has("params") or not operation.has("num_layers") or not operation.has("input"):
        raise UnsupportedForm("packed sequences")
    data, parameters = operation.need("input"), operation.keys("params")
    biased, layers = operation.argument("has_biases"), operation.argument("num_layers")
    directions = 2 if operation.argument("bidirectional") else 1
    each = 4 if biased else 2
    if len(parameters) != each * layers * directions:
        raise UnsupportedForm("projections")
    states = operation.keys("hx") if isinstance(operation.argument("hx"), list | tuple) else [operation.need("hx")]
    gates = _GATES.get(operation.name, 1)
    below = data
    for layer in range(layers):
        hidden = operation.shape(parameters[layer * directions * each + 1])[1]
        joined = operation.virtual(f"layer{layer}", (directions * hidden,))
        for direction in range(directions):
            start = (layer * directions + direction) * each
            weights = parameters[start : start + each]
            recurrence = weights[1]
            for number, weight in enumerate(weights):
                gated = operation.virtual(f"gates{start + number}", (gates, hidden))
                operation.regroup(weight, [0], gated, [0, 1])
                operation.link(gated, 1, recurrence, 1)
                operation.freeze(gated, 0, "the number of gates")
            operation.link(below, -1, weights[0], 1)
            units = np.arange(hidden)
            operation.link(recurrence, 1, joined, 0, units, units + direction * hidden)
            for state in states:
                operation.link(state, -1, recurrence, 1)
        below = joined
    operation.link(below, 0, operation.outputs[0], -1)
    for state in operation.outputs[1:]:
        operation.link(state, -1, parameters[1], 1)
    for key in (data, operation.outputs[0]):
        operation.freeze(key, (0, 1), "time and batch of a recurrent layer")
    for state in [*states, *operation.outputs[1:]]:
        operation.freeze(state, range(operation.rank(state) - 1), "layers and batch of a recurrent layer")


def cell(operation: Operation) -> None:
    """One step of one layer: x(N, I) h(N, H) -> h(N, H), with weights of gates x hidden rows."""
    data, recurrence = operation.need("input"), operation.need("w_hh")
    gates = _GATES.get(operation.name.removesuffix("_cell"), 1)
    hidden = operation.shape(recurrence)[1]
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        weight = operation.key(name)
        if weight is not None:
            gated = operation.virtual(name, (gates, hidden))
            operation.regroup(weight, [0], gated, [0, 1])
            operation.link(gated, 1, recurrence, 1)
            operation.freeze(gated, 0, "the number of gates")
    operation.link(data, -1, operation.need("w_ih"), 1)
    states = operation.keys("hx") if isinstance(operation.argument("hx"), list | tuple) else [operation.need("hx")]
    for state in [*states, *operation.outputs]:
        operation.link(state, -1, recurrence, 1)
        for axis in range(operation.rank(state) - 1):
            operation.link(state, axis, data, axis)


RULES: Rules = {
    **rules_for(recurrent, "lstm", "gru", "rnn_tanh", "rnn_relu"),
    **rules_for(cell, "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}
