"""The mean of several models' outputs, in the form of one model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from mil_cli.errors import TaskError
from mil_cli.task.divergence import check_same_shape


def mean_of_probabilities(
    logits: Sequence[torch.Tensor], weights: Sequence[float], *, temperature: float, axis: int = -1
) -> torch.Tensor:
    """Return logits z for which softmax(z / T) is the weighted mean of the models' own softmax(. / T).

    Probabilities are averaged, since the logits of models that were trained apart differ in scale.

    Args:
        logits: The class scores of each model, of one shape.
        weights: One for each, at least 0, of sum 1.
        temperature: T, above 0.
        axis: The class axis.

    Returns:
        Float32, in the shape of the logits.

    Raises:
        TaskError: Shapes that differ.
    """
    check_shapes(logits)
    shares = torch.tensor(weights, device=logits[0].device).log()
    logarithms = [torch.log_softmax(each.float() / temperature, axis) for each in logits]
    stacked = torch.stack([own + share for own, share in zip(logarithms, shares, strict=True)])
    return temperature * torch.logsumexp(stacked, 0)


def weighted_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of tensors of one shape; weights are at least 0, of sum 1.

    Raises:
        TaskError: Shapes that differ.
    """
    check_shapes(tensors)
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def weighted_mean_of_all(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """Return the first outputs with the weighted mean over all models in place of every real tensor.

    Raises:
        TaskError: The outputs differ in form or shape.
    """
    leaves, tree = tree_flatten(outputs[0])
    columns = []
    for each in outputs:
        own, its_tree = tree_flatten(each)
        if its_tree != tree:
            raise TaskError(
                "the teachers' outputs differ in form",
                where="teachers",
                value=str(its_tree),
                hint="all teachers must give the same outputs as the model",
            )
        columns.append(own)
    means = [
        weighted_mean([column[place] for column in columns], weights)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        else leaf
        for place, leaf in enumerate(leaves)
    ]
    return tree_unflatten(means, tree)


def check_shapes(tensors: Sequence[torch.Tensor]) -> None:
    """Refuse outputs of several teachers that differ in shape.

    Raises:
        TaskError: They do.
    """
    for tensor in tensors[1:]:
        check_same_shape(tensors[0], tensor)
