"""ZiCo: gradients that are large and differ little between batches."""

from __future__ import annotations

import math

import torch

from mil_cli.assess.scores.subject import Subject


def zico(subject: Subject) -> float:
    """Return the sum over convolutions and linear layers of ``log(sum over weights of mean |g| / std g)``.

    Li et al. 2023, "ZiCo: Zero-shot NAS via inverse coefficient of variation on gradients". Mean and standard deviation
    are over batches; weights whose gradient is the same in all of them do not count, nor does a layer of such weights.
    """
    total = 0.0
    for gradients in zip(*(subject.gradients(number) for number in range(len(subject.batches))), strict=True):
        each = torch.stack(gradients).flatten(1)
        spread = each.std(0, correction=0)
        counted = spread != 0
        ratio = float((each.abs().mean(0)[counted] / spread[counted]).sum(dtype=torch.float64))
        total += math.log(ratio) if ratio else 0.0
    return total
