"""The covariance of Jacobians: whether samples are told apart by how outputs depend on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.assess.scores.subject import Subject
from mil_cli.errors import ModelError

_FLOOR = 1e-5


def jacov(subject: Subject) -> float:
    """Return ``-sum(log(v + k) + 1 / (v + k))`` over the eigenvalues v of the samples' correlations, k = 1e-5.

    Mellor et al. 2020, "Neural architecture search without training" (its first version). What is correlated is each
    sample's derivative of the sum of all outputs by the inputs; the score is largest where no two samples' are alike.
    NaN where some sample's derivative is constant, as if no input mattered.

    Raises:
        ModelError: The model takes no floating-point input with an axis of samples.
    """
    rows = torch.cat(_derivatives(subject), dim=1).double()
    correlations = torch.corrcoef(rows)
    if correlations.ndim < 2 or not bool(correlations.isfinite().all()):
        return float("nan")
    values = torch.linalg.eigvalsh(correlations) + _FLOOR
    return -float((values.log() + 1 / values).sum())


def _derivatives(subject: Subject) -> list[Tensor]:
    """Return for each floating-point input the derivative of the outputs' sum, ``[samples, numbers]``."""
    call: Any = pytree.tree_map_only(
        Tensor,
        lambda value: value.detach().requires_grad_(value.is_floating_point()),
        subject.task.inputs(subject.batches[0]),
    )
    spec = subject.model.spec
    axes = [tensor.batch_axis() if spec.batch else 0 for tensor in spec.inputs]
    tensors = subject.model.flat_inputs(*call[0], **call[1])
    inputs = [
        (value, axis)
        for value, axis in zip(tensors, axes, strict=True)
        if value.requires_grad and value.ndim and axis is not None
    ]
    if not inputs:
        raise ModelError(
            "the model takes no floating-point input of which outputs could be derived",
            value=[f"{tensor.name}: {tensor.dtype}" for tensor in spec.inputs],
            hint="take a score that looks at weights or activations",
        )
    outputs = subject.run(subject.network, pytree.tree_map_only(Tensor, torch.clone, call))
    floating = [value for value in subject.model.flatten_outputs(outputs) if value.is_floating_point()]
    derivatives = torch.autograd.grad(
        floating,
        [value for value, _ in inputs],
        [torch.ones_like(value) for value in floating],
        allow_unused=True,
        materialize_grads=True,
    )
    return [derivative.movedim(axis, 0).flatten(1) for derivative, (_, axis) in zip(derivatives, inputs, strict=True)]
