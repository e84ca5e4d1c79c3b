"""What a score looks at: one architecture with its first weights, and what several scores need of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mil_cli.assess.scores.layers import weighted_layers
from mil_cli.data.base import Batch, batch_length, mix_seed
from mil_cli.errors import ModelError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.task.base import Task


class Subject:
    """One architecture under assessment; nothing that a score does to it shows in the model, or to another score.

    Args:
        model: The architecture, with the weights that it is to be scored with; it is not changed.
        task: Gives inputs and loss.
        batches: Training samples on the model's device; most scores look at the first batch alone.
        seed: What dropout draws from.
    """

    def __init__(self, model: Model, task: Task, batches: Sequence[Batch], *, seed: int) -> None:
        self.model = model
        self.task = task
        self.batches = batches
        self._seed = seed
        self._gradients: dict[int, list[Tensor]] = {}

    @cached_property
    def network(self) -> Model:
        """A copy in functional form and training mode, of which only the layers' weights take gradients."""
        network = self.model.clone()
        make_functional(network.graph)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for weight in weighted_layers(network.graph).values():
            weight.requires_grad_(True)
        return network.train()

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The weights of convolutions and linear layers of `network`, shared ones once.

        Raises:
            ModelError: There is none.
        """
        weights = list(dict.fromkeys(weighted_layers(self.network.graph).values()))
        if not weights:
            raise ModelError("the model has no convolution and no linear layer whose weight could be looked at")
        return weights

    @property
    def samples(self) -> int:
        """How many samples the first batch has."""
        return batch_length(self.batches[0])

    def run(self, network: Callable[..., Any], call: tuple[Sequence[Any], dict[str, Any]], number: int = 0) -> Any:
        """Return what a network gives for a call; what it draws depends on the seed and the batch's number alone."""
        args, kwargs = call
        cards = sorted({parameter.device.index for parameter in self.model.parameters() if parameter.is_cuda})
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(mix_seed(self._seed, number))
            return network(*args, **kwargs)

    def loss(self, number: int = 0) -> Tensor:
        """Return the loss of `network` on one of the batches, in training mode."""
        batch = self.batches[number]
        return self.task.loss(self.run(self.network, self.task.inputs(batch), number), batch)

    def gradients(self, number: int = 0) -> list[Tensor]:
        """Return the gradient of the loss on one of the batches by each of `weights`; zeros where none reaches it."""
        if number not in self._gradients:
            found = torch.autograd.grad(self.loss(number), self.weights, allow_unused=True, materialize_grads=True)
            self._gradients[number] = list(found)
        return self._gradients[number]
