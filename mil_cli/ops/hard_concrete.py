"""The operator ``mil::hard_concrete``: a random gate between 0 and 1, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""Beta, gamma and zeta of the paper."""

SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
"""The log-odds at which a gate is as likely closed as not."""


@torch.library.custom_op("mil::hard_concrete", mutates_args=(), schema="(Tensor log_odds, bool train) -> Tensor")
def hard_concrete(log_odds: Tensor, train: bool) -> Tensor:
    """Return gates: drawn anew at each call while training, else as the paper sets them afterwards.

    Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization": with u uniform,
    ``s = sigmoid((log u - log(1 - u) + log_odds) / beta)``, or ``s = sigmoid(log_odds)`` afterwards, is stretched to
    (gamma, zeta) and clipped to [0, 1].

    Args:
        log_odds: Any shape.
        train: Whether to draw; from torch's global generator, as dropout does.

    Returns:
        A tensor like `log_odds`. Its gradient is that of the drawn value, and 0 where it was clipped.
    """
    odds = log_odds
    if train:
        smallest = torch.finfo(log_odds.dtype).eps
        drawn = torch.rand_like(log_odds).clamp_(smallest, 1 - smallest)
        odds = (drawn.logit() + log_odds) / TEMPERATURE
    return (odds.sigmoid() * (HIGH - LOW) + LOW).clamp_(0, 1)


def probability_open(log_odds: Tensor) -> Tensor:
    """Return the probability that a drawn gate is not 0: ``sigmoid(log_odds - beta * log(-gamma / zeta))``."""
    return torch.sigmoid(log_odds - SHIFT)


@hard_concrete.register_fake
def _(log_odds: Tensor, train: bool) -> Tensor:
    return torch.empty_like(log_odds)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.train = inputs
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (gate,) = ctx.saved_tensors
    share = (gate - LOW) / (HIGH - LOW)
    slope = share * (1 - share) * (HIGH - LOW) / (TEMPERATURE if ctx.train else 1.0)
    return torch.where((gate > 0) & (gate < 1), grad * slope, 0.0), None


hard_concrete.register_autograd(_backward, setup_context=_setup_context)
