"""The module of a designed space, whose weights all architectures share, as the training loop trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from torch import nn

from mil_cli.data.base import mix_seed
from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.training.eager import EagerModule, Samples
from mil_cli.training.trainee import Trainee

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.graph.spec import ModelSpec
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Running


class SharedModule(EagerModule):
    """A space's module; in training another architecture may run in each step, in evaluation the largest one does.

    Args:
        module: The module, which holds choices.
        spec: What each of its architectures takes and gives.
        samples: Example ``(args, kwargs)``.

    Attributes:
        space: The space, on the weights that are trained.
    """

    def __init__(self, module: nn.Module, *, spec: ModelSpec, samples: Samples) -> None:
        super().__init__(module, spec=spec, samples=samples)
        self.space = DesignedSpace(module)
        self.graph = _Runs(self.space)

    @classmethod
    def beside(cls, model: Model, space: DesignedSpace) -> Self:
        """Return the module of a space; of a captured architecture of it, what it takes is known."""
        return cls(space.module, spec=model.spec, samples=model.samples)

    def plain(self, architecture: Architecture) -> nn.Module:
        """Return an architecture as a plain module with copies of its weights."""
        return self.space.build(architecture, inherit=True)

    def run(self, choose: Callable[[], Architecture]) -> None:
        """Make each forward pass in training run what `choose` gives then."""
        self.graph.choose = choose  # type: ignore[assignment]


class Paths(Trainee, Protocol):
    """Weights of a space in training, which run one architecture in each forward pass."""

    @property
    def space(self) -> DesignedSpace:
        """The space."""
        ...

    def run(self, choose: Callable[[], Architecture]) -> None:
        """Make each forward pass in training run what `choose` gives then."""
        ...


P = TypeVar("P", bound=Paths)


class _Runs(nn.Module):
    """Runs one architecture of a space."""

    def __init__(self, space: DesignedSpace) -> None:
        super().__init__()
        self.module = space.module
        self._space = space
        self.choose: Callable[[], Architecture] = lambda: space.largest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._space.active(self.choose() if self.training else self._space.largest):
            return self.module(*args, **kwargs)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of what is drawn in one step of a training: the same one when it is resumed there."""
    return torch.Generator().manual_seed(mix_seed(seed, step))


def forward(running: Running[SharedModule], architecture: Architecture, task: Task, batch: Batch) -> Any:
    """Return what an architecture gives on a batch, on the weights that are being trained."""
    args, kwargs = task.inputs(batch)
    space = running.model.space
    with space.active(architecture):
        return running.forward(space.module, *args, **kwargs)
