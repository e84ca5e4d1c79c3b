"""The size of the loss's gradient before training."""

from __future__ import annotations

from mil_cli.assess.scores.subject import Subject


def grad_norm(subject: Subject) -> float:
    """Return the sum over convolutions and linear layers of the Euclidean norm of their weight's gradient.

    Abdelfattah et al. 2021, "Zero-cost proxies for lightweight NAS".
    """
    return sum(float(gradient.norm()) for gradient in subject.gradients())
