"""How strong each operator of a space is: numbers that are learnt by gradients, and the architecture they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mil_cli.spaces import Node, OneOf, Zero
from mil_cli.stages.nas.stability import largest_eigenvalue

if TYPE_CHECKING:
    from mil_cli.spaces import Architecture, DesignedSpace
    from mil_cli.spaces.decisions import Decision

Weights = dict[str, Tensor]
"""By the name of a decision: a weight for each operator (operators,)."""

_SPREAD = 1e-3
"""The standard deviation that strengths begin with, as in the authors' code."""


_RECORDS = ("history", "trace", "eigenvalues")


class Strengths(nn.Module):
    """The strengths of operators, of edges too if asked for, with the optimizer that trains them.

    It is a companion of a training: its state has all that a resumed search needs.

    Args:
        space: The space; every decision between operators gets strengths.
        generator: Draws the first strengths.
        learning_rate: Of Adam.
        weight_decay: Of Adam.
        apart: Whether each operator has a weight of its own, from 0 to 1; else those of an edge add up to 1.
        edges: Whether edges have strengths too: those into a node then add up to 1.

    Attributes:
        alpha: The strengths of operators (operators of all decisions,).
        beta: Those of edges (edges of all nodes,); empty if they have none.
        updates: How often they were trained.
        history: The weights after each epoch that was recorded.
        trace: The strengths after each such epoch since they learn.
        eigenvalues: The largest of the Hessian of their loss after each of those, where it was asked for.
    """

    def __init__(
        self,
        space: DesignedSpace,
        *,
        generator: torch.Generator,
        learning_rate: float,
        weight_decay: float,
        apart: bool,
        edges: bool,
    ) -> None:
        super().__init__()
        self._counts = {one.name: len(one.choices) for one in operator_decisions(space)}
        self._nodes = nodes_of(space) if edges else []
        self._apart = apart
        sizes = sum(self._counts.values()), sum(map(len, self._nodes))
        # The training loop leaves what needs no gradient to this optimizer.
        self.alpha, self.beta = (
            nn.Parameter(_SPREAD * torch.randn(size, generator=generator), requires_grad=False) for size in sizes
        )
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._optimizer = torch.optim.Adam(
            [self.alpha, self.beta], lr=learning_rate, betas=(0.5, 0.999), weight_decay=weight_decay
        )
        self.history: list[dict[str, list[float]]] = []
        self.trace: list[tuple[Tensor, Tensor]] = []
        self.eigenvalues: list[float] = []

    def weights(self, alpha: Tensor | None = None, beta: Tensor | None = None) -> Weights:
        """Return the weights that strengths stand for; its own unless others are given, which gradients then reach."""
        alpha, beta = self.alpha if alpha is None else alpha, self.beta if beta is None else beta
        parts = zip(self._counts, torch.split(alpha, list(self._counts.values())), strict=True)
        weights = {name: part.sigmoid() if self._apart else part.softmax(0) for name, part in parts}
        into = torch.split(beta, list(map(len, self._nodes))) if self._nodes else ()
        for names, part in zip(self._nodes, into, strict=True):
            for name, share in zip(names, part.softmax(0), strict=True):
                weights[name] = share * weights[name]
        return weights

    def step(self, loss: Callable[[Weights], Tensor]) -> None:
        """Take one step of the optimizer down a loss of the weights."""
        held = [self.alpha, self.beta]
        with torch.enable_grad():
            leaves = [one.detach().clone().requires_grad_() for one in held]
            gradients = torch.autograd.grad(loss(self.weights(*leaves)), leaves, materialize_grads=True)
        for one, gradient in zip(held, gradients, strict=True):
            one.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.updates += 1

    def record(self, loss: Callable[[Weights], Tensor] | None = None) -> None:
        """Keep the weights of this moment, the strengths if they learn by now, and how sharply a loss bends there."""
        self.history.append({name: part.tolist() for name, part in self.weights().items()})
        if not self.updates:
            return
        self.trace.append((self.alpha.clone(), self.beta.clone()))
        if loss is not None:
            sizes = [len(self.alpha), len(self.beta)]
            flat = torch.cat([self.alpha, self.beta])
            self.eigenvalues.append(largest_eigenvalue(lambda at: loss(self.weights(*torch.split(at, sizes))), flat))

    def go_back(self, epochs: int) -> None:
        """Take the strengths of so many recorded epochs before the last."""
        for one, kept in zip((self.alpha, self.beta), self.trace[-1 - epochs], strict=True):
            one.copy_(kept)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is beside the tensors of the module."""
        return {"optimizer": self._optimizer.state_dict(), **{name: getattr(self, name) for name in _RECORDS}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        for name in _RECORDS:
            setattr(self, name, list(state[name]))


def zero_one(weights: Weights) -> Tensor:
    """Return the loss that drives weights away from 1/2, towards 0 or 1: the mean of ``-(w - 1/2)^2``, in [-1/4, 0].

    Chu et al. 2020, "Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture Search"
    (arXiv:1911.12126).
    """
    return -(torch.cat(list(weights.values())) - 0.5).square().mean()


def operator_decisions(space: DesignedSpace) -> list[Decision]:
    """Return the decisions between operators, in the order of the space."""
    return [decision for decision in space.decisions if isinstance(decision.holder, OneOf)]


def nodes_of(space: DesignedSpace) -> list[tuple[str, ...]]:
    """Return for each node the names of the decisions on its edges; nodes that share their decisions count once."""
    places = {place.path: one.name for one in operator_decisions(space) for place in one.places}
    nodes: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for path, module in space.module.named_modules():
        if isinstance(module, Node):
            paths = (f"{path}.edges.{index}" if path else f"edges.{index}" for index in range(len(module.edges)))
            names = dict.fromkeys(name for one in paths if (name := places.get(one)) is not None)
            node = tuple(name for name in names if name not in seen)
            seen.update(node)
            nodes += [node] if node else []
    return nodes


def derive(
    space: DesignedSpace, weights: Mapping[str, Tensor], *, edges: int | None, threshold: float = 0.0
) -> Architecture:
    """Return the architecture that weights stand for: on each edge the strongest operator that passes something on.

    Args:
        space: The space.
        weights: By decision, as from `Strengths.weights`.
        edges: How many edges into a node are kept: those whose operators have the largest weights; the others pass
            nothing on. None: all.
        threshold: Edges into a node whose operators all have smaller weights pass nothing on either, but for the
            strongest, without which nothing would pass the node. Only edges that may be a `Zero` can be left out.

    Returns:
        The architecture; what is chosen beside operators is as large as it can be.
    """
    numbers = {one.name: number for number, one in enumerate(space.decisions)}
    indices = list(space.largest_choices)
    strongest: dict[str, float] = {}
    nothing: dict[str, int] = {}
    for decision in operator_decisions(space):
        operators = _operators(space, decision)
        values = weights[decision.name].tolist()
        zeros = [index for index, operator in enumerate(operators) if isinstance(operator, Zero)]
        passing = [index for index in range(len(operators)) if index not in zeros] or zeros
        best = max(passing, key=values.__getitem__)
        indices[numbers[decision.name]], strongest[decision.name] = best, values[best]
        if zeros:
            nothing[decision.name] = zeros[0]
    for names in nodes_of(space):
        ranked = sorted(names, key=lambda name: -strongest[name])
        for place, name in enumerate(ranked):
            weak = place > 0 and strongest[name] < threshold
            if name in nothing and (weak or (edges is not None and place >= edges)):
                indices[numbers[name]] = nothing[name]
    return space.at(indices)


def count_skips(space: DesignedSpace, architecture: Architecture) -> int:
    """Return how many decisions of an architecture chose the identity; one that several cells share counts once."""
    return sum(
        isinstance(_operators(space, one)[one.choices.index(architecture[one.name])], nn.Identity)
        for one in operator_decisions(space)
        if one.name in architecture
    )


def _operators(space: DesignedSpace, decision: Decision) -> Sequence[nn.Module]:
    choice = space.choices_of(decision)[0]
    return [choice.operator(index) for index in range(len(decision.choices))]
