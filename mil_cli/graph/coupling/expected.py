"""What is left of a network whose classes each stay with some probability: a smooth count that can be trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mil_cli.graph.coupling.counts import Axes, Counter
from mil_cli.graph.coupling.record import Key

Counted = Literal["macs", "params", "channels"]


class ExpectedCount:
    """The expected share of a count that is left where every class stays or goes independently of all others.

    The size of an axis is expected to be the sum of its entries' probabilities, exactly; an entry on which several
    spaces lie stays with the product of theirs. A call, or a parameter, counts as its axes multiply: the share of each
    to the power that doubling it shows. That is the exact expectation where the axes belong to different spaces, as
    those of most layers do. Where one space lies on both axes of a weight (a convolution from a residual stream into
    itself) ``E[n]^2`` stands for ``E[n^2]``, too little by the variance of n, and where a call is a sum of products
    (attention whose queries and values are cut apart) the power stands for the sum. The first error vanishes as
    probabilities come to 0 or 1, the second does not; a cut is counted by `Counter`.

    Args:
        counter: Counts the network.
        counted: What.

    Attributes:
        offsets: By space: where its classes begin in the vector of probabilities; one more at the end: its length.
    """

    def __init__(self, counter: Counter, counted: Counted) -> None:
        self._spaces = counter.coupling.spaces
        self.offsets = [0]
        for space in self._spaces:
            self.offsets.append(self.offsets[-1] + space.size)
        axes, weights, powers = _parts(counter, counted)
        shared = [place for place, alike in enumerate(axes) if alike.entries is None]
        self._shared = [(place, _labels(axes[place], self.offsets)) for place in shared]
        entries = torch.zeros(len(axes), self.offsets[-1])
        rest = torch.zeros(len(axes))
        for place, alike in enumerate(axes):
            if alike.entries is None:
                continue
            first = self.offsets[alike.spaces[0]]
            share = torch.as_tensor(alike.entries) / alike.size
            entries[place, first : first + len(share)] = share
            rest[place] = 1 - share.sum()
        self._entries, self._rest = entries.double().to_sparse(), rest.double()
        self._powers = powers.double()
        self._weights = weights.double() / weights.double().sum()
        free = torch.zeros(self.offsets[-1], dtype=torch.float64)
        for number, space in enumerate(self._spaces):
            if space.free:
                free[self.offsets[number] : self.offsets[number + 1]] = 1
        self._free = free / free.sum().clamp(min=1)
        self._channels = counted == "channels"

    def __call__(self, kept: Tensor) -> Tensor:
        """Return the share that is expected to be left, a scalar with a gradient.

        Args:
            kept: Probability that each class stays, float64 ``[classes of all spaces]``; 1 for what cannot be cut.
        """
        if self._channels:
            return (self._free * kept).sum()
        shares = torch.sparse.mm(self._entries, kept.unsqueeze(1)).squeeze(1) + self._rest
        for place, labels in self._shared:
            padded = torch.cat([kept, kept.new_ones(1)])
            share = torch.stack([padded[each] for each in labels]).prod(0).mean()
            shares = shares.index_put((torch.tensor(place),), share)
        logs = self._powers @ shares.clamp(min=1e-12).log()
        total: Tensor = (self._weights * logs.exp()).sum()
        return total


def _labels(alike: Axes, offsets: Sequence[int]) -> list[Tensor]:
    """Return by space the place of each entry in the vector of probabilities; the last for entries without a class."""
    found = []
    for space, labels in zip(alike.spaces, alike.labels, strict=True):
        classes = torch.as_tensor(labels).long()
        found.append(torch.where(classes < 0, offsets[-1], classes + offsets[space]))
    return found


def _parts(counter: Counter, counted: Counted) -> tuple[list[Axes], Tensor, Tensor]:
    """Return the axes, the count of each part, and the power with which each axis counts in it ``[parts, axes]``."""
    if counted == "macs":
        axes = counter.node_axes
        nodes = list(counter.counted.items())
        powers = torch.zeros(len(nodes), len(axes))
        for column, alike in enumerate(axes):
            doubled: dict[Key, dict[int, int]] = {}
            for key, axis in alike.places:
                doubled.setdefault(key, {})[axis] = 2 * alike.size
            for row, (node, macs) in enumerate(nodes):
                powers[row, column] = math.log2(counter.macs_of_node(node, doubled) / macs)
        return axes, torch.tensor([float(macs) for _, macs in nodes]), powers
    axes = counter.parameter_axes
    parameters: Mapping[Key, tuple[int, ...]] = counter.parameters
    rows = {key: row for row, key in enumerate(parameters)}
    powers = torch.zeros(len(parameters), len(axes))
    for column, alike in enumerate(axes):
        for key, _ in alike.places:
            powers[rows[key], column] += 1
    return axes, torch.tensor([float(math.prod(shape)) for shape in parameters.values()]), powers
