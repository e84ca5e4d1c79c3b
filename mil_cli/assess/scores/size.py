"""The two baselines that a score has to beat: how much a network computes, and how many parameters it has."""

from __future__ import annotations

from mil_cli.assess.scores.subject import Subject


def macs(subject: Subject) -> float:
    """Return the multiply-accumulates of one sample (of the whole batch where it is fixed)."""
    return float(subject.model.macs())


def params(subject: Subject) -> float:
    """Return the number of parameters that the graph uses."""
    return float(subject.model.num_params())
