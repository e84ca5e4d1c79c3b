"""The operators of weight clustering: ``mil::lookup`` reads weights from a codebook, ``mil::cluster`` rounds to one.

The rows of a weight, along its first axis, are divided into equal groups, each with entries of its own. A codebook is
flat, ``[groups * entries]``: like a bias it is no matrix, and gets no weight decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "mil::lookup", mutates_args=(), schema="(Tensor codebook, Tensor indices, int groups) -> Tensor"
)
def lookup(codebook: Tensor, indices: Tensor, groups: int) -> Tensor:
    """Return the entries of a codebook that indices name.

    Args:
        codebook: ``[groups * entries]``, floating.
        indices: uint8, shaped like the weight: by group the number of an entry.
        groups: Number of groups; the weight's first axis divides by it.

    Returns:
        The weight. An entry's gradient is the mean of those of its weights: their sum, exact as it is, would move an
        entry by thousands of times what it would move a weight.
    """
    rows = indices.reshape(groups, -1).long()
    return codebook.reshape(groups, -1).gather(1, rows).reshape(indices.shape)


@lookup.register_fake
def _(codebook: Tensor, indices: Tensor, groups: int) -> Tensor:
    return torch.empty(indices.shape, dtype=codebook.dtype, device=codebook.device)


@torch.library.custom_op(
    "mil::lookup_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor codebook, Tensor indices, int groups) -> Tensor",
)
def _lookup_backward(grad: Tensor, codebook: Tensor, indices: Tensor, groups: int) -> Tensor:
    rows = indices.reshape(groups, -1).long()
    totals = torch.zeros_like(codebook.reshape(groups, -1)).scatter_add_(1, rows, grad.reshape(rows.shape))
    ones = torch.ones((), dtype=grad.dtype, device=grad.device).expand(rows.shape)
    totals /= torch.zeros_like(totals).scatter_add_(1, rows, ones).clamp_(min=1)
    return totals.reshape(codebook.shape)


@_lookup_backward.register_fake
def _(grad: Tensor, codebook: Tensor, indices: Tensor, groups: int) -> Tensor:
    return torch.empty_like(codebook)


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codebook, indices, ctx.groups = inputs
    ctx.save_for_backward(codebook, indices)


def _lookup_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _lookup_backward(grad, *ctx.saved_tensors, ctx.groups), None, None


lookup.register_autograd(_lookup_gradient, setup_context=_lookup_setup)


def nearest(weight: Tensor, codebook: Tensor, groups: int) -> Tensor:
    """Return the number of the nearest entry for each weight, int64, shaped like the weight.

    By the midpoints of the sorted entries, in memory that does not grow with their number.
    """
    entries, order = codebook.detach().reshape(groups, -1).sort(1)
    borders = (entries[:, 1:] + entries[:, :-1]) / 2
    rows = weight.detach().reshape(groups, -1).contiguous()
    places = torch.searchsorted(borders.contiguous(), rows)
    return order.gather(1, places).reshape(weight.shape)


@torch.library.custom_op(
    "mil::cluster", mutates_args=(), schema="(Tensor weight, Tensor codebook, int groups) -> Tensor"
)
def cluster(weight: Tensor, codebook: Tensor, groups: int) -> Tensor:
    """Return each weight's nearest entry of a codebook, while both train.

    Args:
        weight: Any shape; its first axis divides by the number of groups.
        codebook: ``[groups * entries]``.
        groups: Number of groups.

    Returns:
        A tensor like `weight`. Its gradient passes to the weight as it is, so that a weight may move to another entry,
        and to the entries as that of `lookup` does.
    """
    values: Tensor = lookup(codebook, nearest(weight, codebook, groups).to(torch.uint8), groups)
    return values


@cluster.register_fake
def _(weight: Tensor, codebook: Tensor, groups: int) -> Tensor:
    return torch.empty_like(weight)


def _cluster_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, codebook, ctx.groups = inputs
    ctx.save_for_backward(weight, codebook)


def _cluster_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    weight, codebook = ctx.saved_tensors
    return grad, _lookup_backward(grad, codebook, nearest(weight, codebook, ctx.groups), ctx.groups), None


cluster.register_autograd(_cluster_gradient, setup_context=_cluster_setup)
