"""SNIP as a score: how much the loss depends, to first order, on whether each weight is there."""

from __future__ import annotations

from mil_cli.assess.scores.subject import Subject


def snip(subject: Subject) -> float:
    """Return the sum of ``|weight * gradient|`` over the weights of convolutions and linear layers.

    Lee et al. 2019, "SNIP: Single-shot network pruning based on connection sensitivity", as Abdelfattah et al. 2021,
    "Zero-cost proxies for lightweight NAS", sum it over a network. The gradient by a mask of ones, which their code
    puts on each weight, is the weight's own gradient times the weight.
    """
    pairs = zip(subject.weights, subject.gradients(), strict=True)
    return sum(float((weight.detach() * gradient).abs().sum()) for weight, gradient in pairs)
