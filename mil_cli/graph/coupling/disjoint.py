"""Disjoint sets of labels (union-find) over whole vectors of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

NO_LABEL = -1


class DisjointSets:
    """Labels 0 ... size - 1, each in a set of its own until they are united; a set is named by its smallest label."""

    def __init__(self, size: int) -> None:
        self._parents: Labels = np.arange(size)

    def roots(self, labels: Labels) -> Labels:
        """Return for each label the name of its set; `NO_LABEL` stays."""
        parents = self._parents
        while True:
            grand = parents[parents]
            if np.array_equal(grand, parents):
                break
            parents = grand
        self._parents = parents
        return np.where(labels >= 0, parents[np.maximum(labels, 0)], NO_LABEL)

    def unite(self, first: Labels, second: Labels) -> None:
        """Unite the sets of ``first[i]`` and ``second[i]`` for each i."""
        parents = self._parents
        for a, b in sorted(set(zip(first.tolist(), second.tolist(), strict=True))):
            while parents[a] != a:
                a = int(parents[a])
            while parents[b] != b:
                b = int(parents[b])
            if a != b:
                parents[max(a, b)] = min(a, b)

    def names(self) -> Labels:
        """Return for every label the name of its set."""
        return self.roots(np.arange(len(self._parents)))
