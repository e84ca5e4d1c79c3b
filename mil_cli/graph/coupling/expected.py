"""What is left of a network whose classes each stay with some probability: a smooth count that can be trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from mil_cli.graph.coupling.counts import Axes, Counter
from mil_cli.graph.coupling.record import Key

Counted = Literal["macs", "params", "channels"]

_SMALLEST = 1e-12
_FACTORS = (1, 2, 3)
"""How much longer an axis is made to see how a count depends on it: enough for sums of products up to squares."""

_ROUNDING = 1e-9


class ExpectedCount:
    """The expected share of a count that is left where every class stays or goes independently of all others.

    The size of an axis is expected to be the sum of its entries' probabilities, exactly; an entry on which several
    spaces lie stays with the product of theirs. A call, or a parameter, counts as a sum of products of its axes' sizes:
    most as one product, attention as two, of its queries' and of its values' channels. The expectation of a product is
    that of the sizes' where the axes belong to different spaces, as those of most layers do, and more by the covariance
    of two sizes where they belong to the same one (a convolution from a residual stream into itself). Left out is only
    the covariance of axes on which several spaces lie at once; it vanishes as probabilities come to 0 or 1.

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
        entries = entries.double()
        self._entries, self._rest = entries.to_sparse(), rest.double()
        self._pairs, self._paired = _pairs(axes, powers)
        self._products = entries[self._pairs].prod(1).to_sparse()
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
        shares = shares.clamp(min=_SMALLEST)
        covariances = torch.sparse.mm(self._products, (kept * (1 - kept)).unsqueeze(1)).squeeze(1)
        logs = self._powers @ shares.log() + self._paired @ (covariances / shares[self._pairs].prod(1)).log1p()
        total: Tensor = (self._weights * logs.exp()).sum()
        return total


def _labels(alike: Axes, offsets: Sequence[int]) -> list[Tensor]:
    """Return by space the place of each entry in the vector of probabilities; the last for entries without a class."""
    found = []
    for space, labels in zip(alike.spaces, alike.labels, strict=True):
        classes = torch.as_tensor(labels).long()
        found.append(torch.where(classes < 0, offsets[-1], classes + offsets[space]))
    return found


def _pairs(axes: Sequence[Axes], powers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of axes that one space alone labels and that some part multiplies, and how often each does.

    Args:
        axes: The axes.
        powers: The power of each in each part, ``[parts, axes]``.

    Returns:
        The pairs, ``[pairs, 2]``, and the number of times that each is in each part, ``[parts, pairs]``.
    """
    found: dict[tuple[int, int], dict[int, float]] = {}
    alone = {place: alike.spaces[0] for place, alike in enumerate(axes) if alike.entries is not None}
    for row, part in enumerate(powers):
        columns = [column for column in part.nonzero().flatten().tolist() if column in alone]
        for first, second in combinations_with_replacement(columns, 2):
            power, other = float(part[first]), float(part[second])
            times = power * (power - 1) / 2 if first == second else power * other
            if alone[first] == alone[second] and times:
                found.setdefault((first, second), {})[row] = times
    paired = torch.zeros(len(powers), len(found), dtype=torch.float64)
    for column, rows in enumerate(found.values()):
        for row, times in rows.items():
            paired[row, column] = times
    return torch.tensor(list(found), dtype=torch.int64).reshape(-1, 2), paired


def _parts(counter: Counter, counted: Counted) -> tuple[list[Axes], Tensor, Tensor]:
    """Return the axes, the count of each part, and the power with which each axis counts in it ``[parts, axes]``."""
    if counted == "macs":
        axes = counter.node_axes
        parts = [part for node in counter.counted for part in _products_of(node, counter, axes)]
        powers = torch.zeros(len(parts), len(axes))
        for row, (_, found) in enumerate(parts):
            for column, power in found.items():
                powers[row, column] = power
        return axes, torch.tensor([macs for macs, _ in parts]), powers
    axes = counter.parameter_axes
    parameters: Mapping[Key, tuple[int, ...]] = counter.parameters
    rows = {key: row for row, key in enumerate(parameters)}
    powers = torch.zeros(len(parameters), len(axes))
    for column, alike in enumerate(axes):
        for key, _ in alike.places:
            powers[rows[key], column] += 1
    return axes, torch.tensor([float(math.prod(shape)) for shape in parameters.values()]), powers


def _products_of(node: Node, counter: Counter, axes: Sequence[Axes]) -> list[tuple[float, dict[int, float]]]:
    """Return what the multiply-accumulates of a call are the sum of: counts, each with the powers of axes in it."""
    recording = counter.coupling.recording
    keys = {*map(recording.key, node.all_input_nodes), recording.key(node)}

    def macs(factors: Mapping[int, int]) -> float:
        longer: dict[Key, dict[int, int]] = {}
        for column, factor in factors.items():
            for key, axis in axes[column].places:
                longer.setdefault(key, {})[axis] = factor * axes[column].size
        return float(counter.macs_of_node(node, longer))

    whole = macs({})
    powers: dict[int, float] = {}
    mixed = []
    for column, alike in enumerate(axes):
        if not any(key in keys for key, _ in alike.places):
            continue
        power = math.log2(macs({column: 2}) / whole)
        if power.is_integer() and macs({column: 3}) == whole * 3**power:
            powers[column] = power
        else:
            mixed.append(column)
    shape = (len(_FACTORS),) * len(mixed)
    given = [macs(dict(zip(mixed, factors, strict=True))) for factors in product(_FACTORS, repeat=len(mixed))]
    coefficients = np.asarray(given).reshape(shape)
    inverse = np.linalg.inv(np.vander(np.asarray(_FACTORS, dtype=np.float64), increasing=True))
    for place in range(len(mixed)):
        coefficients = np.moveaxis(np.tensordot(inverse, coefficients, axes=(1, place)), 0, place)
    return [
        (float(count), powers | dict(zip(mixed, map(float, exponents), strict=True)))
        for exponents, count in np.ndenumerate(coefficients)
        if abs(count) > _ROUNDING * whole
    ]
