"""A module as the training loop trains it, without capturing it first: for nets that are trained only to be judged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from mil_cli.graph.spec import ModelSpec

Samples = tuple[tuple[Any, ...], dict[str, Any]]


class EagerModule:
    """A module with what is known of its inputs; a `mil_cli.training.trainee.Trainee`.

    Args:
        module: The module; it is trained itself, `clone` gives another one.
        spec: What it takes and gives.
        samples: Example ``(args, kwargs)``.

    Attributes:
        module: The module, which holds the weights.
        graph: What runs: the module, or one around it.
        spec: As given.
        samples: As given.
    """

    def __init__(self, module: nn.Module, *, spec: ModelSpec, samples: Samples) -> None:
        self.module, self.spec, self.samples = module, spec, samples
        self.graph: nn.Module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module in its present mode."""
        return self.graph(*args, **kwargs)

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.graph.training

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode (or back), in place."""
        self.graph.train(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode, in place."""
        return self.train(False)

    def clone(self) -> Self:
        """Return a deep copy."""
        return type(self)(copy.deepcopy(self.module), spec=self.spec, samples=self.samples)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, each once."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by the user's names, each once."""
        return self.module.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The live weights and buffers by the user's names."""
        return self.module.state_dict()
