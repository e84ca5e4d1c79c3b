"""What makes inputs look like a teacher's training data to the teacher: statistics, certain classes, smoothness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.training.batch_norm import STATISTICS, norms_with_statistics

if TYPE_CHECKING:
    from mil_cli.graph.model import Model

_CHANNEL_AXIS = 1
_LAST_LAYERS = ("linear", "addmm", "matmul", "mm", "conv1d", "conv2d", "conv3d")


class NormStatistics:
    """How far a batch is from what the batch norms of a model saw in training.

    Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (CVPR), equation 4.

    Args:
        model: The model, in evaluation mode; not changed.
        first_weight: Factor on the first batch norm, which sees the input almost as it is.
    """

    def __init__(self, model: Model, *, first_weight: float = 1.0) -> None:
        self._model = model
        self._norms = norms_with_statistics(model)
        self._first_weight = first_weight

    @property
    def taps(self) -> dict[str, Node]:
        """By name the values that `distance` needs: what each batch norm reads."""
        return {node.name: get_argument(node, "input") for node in self._norms}

    def distance(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over all batch norms of ``|mean - running_mean| + |variance - running_var|``, a scalar.

        Means and (unbiased) variances are by channel over all else, ``|.|`` is the Euclidean norm over the channels.

        Args:
            values: The values of `taps` on a batch, each of shape (batch, channels, ...).
        """
        total = torch.zeros(())
        for index, node in enumerate(self._norms):
            value = values[node.name].float()
            axes = [axis for axis in range(value.ndim) if axis != _CHANNEL_AXIS]
            found = torch.var_mean(value, axes)
            kept = [get_attribute(self._model.graph, str(get_argument(node, name).target)) for name in STATISTICS]
            gaps = [torch.linalg.vector_norm(one - other) for one, other in zip(reversed(found), kept, strict=True)]
            total = total.to(value.device) + sum(gaps) * (self._first_weight if index == 0 else 1.0)
        return total

    def __len__(self) -> int:
        return len(self._norms)


def last_features(model: Model) -> Node | None:
    """Return what the last linear layer or convolution of a model reads: its features; None if it has none."""
    layers = [node for node in calls(model.graph) if op_name(node) in _LAST_LAYERS]
    read = layers[-1].all_input_nodes if layers else []
    return next((node for node in read if node.op != "get_attr"), None)


def certainty_loss(scores: Tensor) -> Tensor:
    """Return the mean cross-entropy of scores (batch, classes) to their own best class: low where all are certain.

    The one-hot loss of Chen et al. 2019, "Data-Free Learning of Student Networks" (ICCV), equation 3.
    """
    return functional.cross_entropy(scores, scores.argmax(1))


def activation_loss(features: Tensor) -> Tensor:
    """Return minus the mean absolute value of features (batch, ...): inputs of no class excite few of them.

    Chen et al. 2019, equation 4 (there the sum over a sample's features).
    """
    return -features.abs().mean()


def balance_loss(scores: Tensor) -> Tensor:
    """Return minus the entropy in nats of the classes of a batch, from scores (batch, classes): low if all are as many.

    The information entropy loss of Chen et al. 2019, equation 5.
    """
    shares = functional.softmax(scores, 1).mean(0)
    return (shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum()


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean divergence KL(teacher || student) over the samples whose best class is the same.

    It is low for inputs that the student has yet to learn from; those on which the two disagree already are left as
    they are (Fang et al. 2022, "Up to 100x Faster Data-Free Knowledge Distillation", AAAI).

    Args:
        student: Scores of shape (batch, classes).
        teacher: Likewise.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student, 1), functional.log_softmax(teacher, 1), reduction="none", log_target=True
    ).sum(1)
    return -(divergence * (student.argmax(1) == teacher.argmax(1))).mean()


def variation(inputs: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours along each axis behind the channels, summed over these axes.

    Args:
        inputs: Shape (batch, channels, ...).
    """
    total = inputs.new_zeros(())
    for axis in range(2, inputs.ndim):
        total = total + inputs.diff(dim=axis).abs().mean() if inputs.shape[axis] > 1 else total
    return total
