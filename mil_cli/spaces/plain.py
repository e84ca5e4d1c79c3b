"""How a module that holds choices is copied as what was chosen: a plain module."""

from __future__ import annotations

import copy
from typing import Any, Self, TypeVar

from torch import nn

T = TypeVar("T")

_PLAIN = object()
"""Under its identity the memo of a copy that replaces parts has the weights made so far, by what they are made of."""

Ties = dict[tuple[int, tuple[int, ...]], nn.Parameter]


class Searchable:
    """A part of a module that a plain copy has something else in place of.

    Deep copies go through everything that a module holds, so what it keeps beside its submodules, a width as an
    attribute or a layer in a list, is replaced too.
    """

    def plain(self, memo: dict[int, Any]) -> Any:
        """Return what stands here in a plain copy, under the choices that are active.

        Args:
            memo: Of the copy that is being made; for `copy.deepcopy` of what is kept.
        """
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.plain(memo) if id(_PLAIN) in memo else self._copied(memo)

    def _copied(self, memo: dict[int, Any]) -> Self:
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result


def plain_copy(value: T) -> T:
    """Return a deep copy in which every `Searchable` part is replaced by what stands for it."""
    return copy.deepcopy(value, {id(_PLAIN): {}})


def ties(memo: dict[int, Any]) -> Ties:
    """Return the weights that a plain copy has so far, by the identity of the shared weight and their shape."""
    found: Ties = memo[id(_PLAIN)]
    return found
