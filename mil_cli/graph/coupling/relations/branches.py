"""The choice between two branches: each result has the axes of both."""

from __future__ import annotations

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for


def _choice(operation: Operation) -> None:
    _, when_true, when_false = operation.node.args
    assert isinstance(when_true, list | tuple)
    assert isinstance(when_false, list | tuple)
    if len(operation.outputs) != len(when_true):
        raise UnsupportedForm("a branch gives a number")
    for output, *results in zip(operation.outputs, when_true, when_false, strict=True):
        for result in results:
            operation.link_all(operation.key_of(result), output)


RULES: Rules = rules_for(_choice, "choose_branch")
