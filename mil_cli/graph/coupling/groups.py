"""Groups of coupled weights while they train: their norms, and gradients that act on whole groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from mil_cli.graph.coupling.coupling import Coupling
from mil_cli.graph.coupling.members import scoring_members


@dataclass(frozen=True)
class _Part:
    """What a space has in one parameter: the class of each index of an axis, ``size`` where there is none."""

    parameter: str
    axis: int
    classes: Tensor

    def along(self, values: Tensor, parameter: Tensor) -> Tensor:
        """Shape one value per index of the axis so that it multiplies the parameter."""
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(parameter.ndim)])


class WeightGroups:
    """The weights of every class of every space that can be cut: a group is what a cut of that class removes.

    Biases do not belong to it: a group whose weights are zero has no say whatever its bias, once norms follow.

    Args:
        graph: The analysed graph.
        coupling: Its analysis.

    Attributes:
        sizes: By space: the number of classes, 0 where none can be cut.
        free: By space: which classes can be cut, bool ``[classes]``.
    """

    def __init__(self, graph: GraphModule, coupling: Coupling) -> None:
        names = {name for name, _ in graph.named_parameters()}
        self.sizes = [space.size if space.free else 0 for space in coupling.spaces]
        self.free = [torch.zeros(size, dtype=torch.bool) for size in self.sizes]
        self._parts: list[list[_Part]] = []
        for number, space in enumerate(coupling.spaces):
            self.free[number][list(space.free)] = True
            parts = []
            for member in scoring_members(graph, space) if space.free else []:
                known = next((name for name in member.names if name in names), None)
                if known is not None:
                    classes = torch.as_tensor(member.classes).long()
                    parts.append(_Part(known, member.axis, torch.where(classes < 0, space.size, classes)))
            self._parts.append(parts)

    def norms(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """Return by space the Euclidean norm of each group, float64 ``[classes]``."""
        found = []
        for size, parts in zip(self.sizes, self._parts, strict=True):
            squares = torch.zeros(size + 1, dtype=torch.float64)
            for part in parts:
                weight = parameters[part.parameter].detach()
                others = [axis for axis in range(weight.ndim) if axis != part.axis]
                lines = weight.square().sum(others) if others else weight.square()
                squares.index_add_(0, part.classes, lines.double().cpu())
            found.append(squares[:-1].sqrt())
        return found

    def shrink(self, parameters: Iterable[tuple[str, Tensor]], factors: Sequence[Tensor]) -> None:
        """Add to the gradients of weights the weights times the factor of their group, in place; frozen groups keep.

        A weight that lies in several groups, as one between two layers does, gets the sum of their factors.

        Args:
            parameters: Names and parameters, with gradients where training reaches them.
            factors: By space: one factor for each class.
        """
        by_name = dict(parameters)
        for number, parts in enumerate(self._parts):
            padded = torch.cat([(factors[number] * self.free[number]).float(), torch.zeros(1)])
            for part in parts:
                parameter = by_name[part.parameter]
                if parameter.grad is not None:
                    along = part.along(padded[part.classes].to(parameter.device), parameter)
                    parameter.grad.add_(parameter.detach() * along)
