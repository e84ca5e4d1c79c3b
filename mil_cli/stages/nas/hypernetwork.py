"""A network that gives the weights of any net of a space, by what was chosen in it; then a search on these weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.spaces.layers import KernelMaps
from mil_cli.stages.nas.one_shot import OneShotConfig, search_shared
from mil_cli.stages.nas.spos import single_path
from mil_cli.stages.registry import stage
from mil_cli.training.eager import EagerModule

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.graph.spec import ModelSpec
    from mil_cli.stages.context import Context
    from mil_cli.training.eager import Samples


class HypernetworkConfig(OneShotConfig):
    """Settings of ``nas/hypernetwork``, beside those of all one-shot searches.

    Attributes:
        hidden: Width of the hypernetwork.
        embedding: Numbers that stand for a place among the weights.
        chunk: Weights that are given at a time.
    """

    method: ClassVar[str] = "hypernetwork"
    version: ClassVar[int] = 2

    hidden: int = Field(64, ge=1, le=4096)
    embedding: int = Field(16, ge=1, le=1024)
    chunk: int = Field(256, ge=1, le=65536)

    def shared(self, model: Model, context: Context) -> Generated:
        """Return a hypernetwork that single paths trained."""
        space = context.space()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            hypernetwork = Hypernetwork(space, hidden=self.hidden, embedding=self.embedding, chunk=self.chunk)
        start = Generated(space, hypernetwork, spec=model.spec, samples=model.samples)
        return context.fit(
            start,
            settings=context.trainer(self.trainer).judged_at_the_end(),
            doing="training the hypernetwork",
            slot="supernet",
            bind=single_path(context.task, seed=context.seed),
        )


@stage(HypernetworkConfig)
def hypernetwork(model: Model, config: HypernetworkConfig, context: Context) -> Model:
    """Return the architecture that is best within the bounds with the weights that a hypernetwork gives it.

    Brock et al. 2018, "SMASH: One-Shot Model Architecture Search through HyperNetworks" (arXiv:1708.05344): each step
    draws an architecture, has its weights given, and trains what gave them. Weights come in chunks, from what was
    chosen and an embedding of their place (Ha et al. 2017, "HyperNetworks", arXiv:1609.09106). Norms and biases are
    shared by all, as in a supernet.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice, or no architecture is within the bounds.
    """
    return search_shared(model, config, context)


class Hypernetwork(nn.Module):
    """Gives the weights of a space's layers for an architecture.

    Args:
        space: The space; those of its parameters are given that have two axes or more, but for maps to smaller kernels.
        hidden: Width of the layers.
        embedding: Numbers that stand for a place among the weights.
        chunk: Weights that are given at a time.
    """

    def __init__(self, space: DesignedSpace, *, hidden: int, embedding: int, chunk: int) -> None:
        super().__init__()
        maps = {
            id(matrix)
            for module in space.module.modules()
            if isinstance(module, KernelMaps)
            for matrix in module.parameters()
        }
        given = {
            name: weight.shape
            for name, weight in space.module.named_parameters()
            if weight.ndim > 1 and id(weight) not in maps
        }
        self._shapes = given
        self._chunks = [math.ceil(shape.numel() / chunk) for shape in given.values()]
        # A layer's outputs are about as large as its inputs, whatever the layer (He et al. 2015).
        self._scales = [math.sqrt(2 / shape[1:].numel()) for shape in given.values()]
        self.places = nn.Parameter(torch.randn(sum(self._chunks), embedding))
        self.code = nn.Sequential(nn.Linear(len(space.encoding_names), hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.mix = nn.Linear(embedding + hidden, hidden)
        self.out = nn.Linear(hidden, chunk)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(hidden))

    def forward(self, code: Tensor) -> dict[str, Tensor]:
        """Return weights by the names of the space's parameters.

        Args:
            code: The architecture, as from `DesignedSpace.encode`.
        """
        chosen = self.code(code).expand(len(self.places), -1)
        mixed = functional.relu(self.mix(torch.cat([self.places, chosen], dim=1)))
        normed = functional.layer_norm(mixed, mixed.shape[1:])  # so that given weights have the variance of their layer
        parts = self.out(normed).split(self._chunks)
        return {
            name: scale * part.flatten()[: shape.numel()].view(shape)
            for (name, shape), part, scale in zip(self._shapes.items(), parts, self._scales, strict=True)
        }


class Generated(EagerModule):
    """A space whose weights a hypernetwork gives; in training another architecture may run in each step.

    Args:
        space: The space; its own weights, but for norms and biases, are not used.
        hypernetwork: Gives them.
        spec: What each architecture takes and gives.
        samples: Example ``(args, kwargs)``.

    Attributes:
        space: The space.
        hypernetwork: The hypernetwork.
    """

    def __init__(self, space: DesignedSpace, hypernetwork: Hypernetwork, *, spec: ModelSpec, samples: Samples) -> None:
        self.space, self.hypernetwork = space, hypernetwork
        self._runs = _Runs(space, hypernetwork)
        super().__init__(self._runs, spec=spec, samples=samples)

    def clone(self) -> Self:
        """Return a deep copy, which runs the largest architecture."""
        space = DesignedSpace(copy.deepcopy(self.space.module))
        return type(self)(space, copy.deepcopy(self.hypernetwork), spec=self.spec, samples=self.samples)

    def run(self, choose: Callable[[], Architecture]) -> None:
        """Make each forward pass in training run what `choose` gives then."""
        self._runs.choose = choose

    @torch.no_grad()
    def plain(self, architecture: Architecture) -> nn.Module:
        """Return an architecture as a plain module with the weights that it is given."""
        parameters = dict(self.space.module.named_parameters())
        for name, weight in self.hypernetwork(_code(self.space, architecture)).items():
            parameters[name].copy_(weight)
        return self.space.build(architecture, inherit=True)


class _Runs(nn.Module):
    """Runs one architecture of a space on the weights that it is given."""

    def __init__(self, space: DesignedSpace, hypernetwork: Hypernetwork) -> None:
        super().__init__()
        self.module, self.hypernetwork = space.module, hypernetwork
        self._space = space
        self.choose: Callable[[], Architecture] = lambda: space.largest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        architecture = self.choose() if self.training else self._space.largest
        weights = self.hypernetwork(_code(self._space, architecture).to(self.hypernetwork.places))
        with self._space.active(architecture):
            return functional_call(self.module, weights, args, kwargs)


def _code(space: DesignedSpace, architecture: Architecture) -> Tensor:
    return torch.from_numpy(space.encode(architecture))
