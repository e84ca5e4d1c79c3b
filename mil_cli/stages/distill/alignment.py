"""Brings features of two models to the same positions: maps of other resolutions, sequences of other lengths."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional

_EXTRA_TOKENS = 6  # class and distillation tokens or registers stand before the image's tokens
_POOLING: Any = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)

Positions = tuple[int, ...]
"""Sizes of the axes that count positions: () for vectors, (tokens,) for sequences, (height, width) for maps."""

Tokens = tuple[bool, bool]
"""For each of two features, whether its sequence is one of tokens, which may stand for the parts of an image."""


def aligned(one: Tensor, other: Tensor, *, tokens: Tokens = (True, True)) -> tuple[Tensor, Tensor]:
    """Return two features at the same positions; channels are left alone.

    The finer is averaged, on each axis, to as many positions as the coarser has. Tokens are laid out as the map that
    they are compared with has it, row by row, without the extra ones at the start; two sequences of different numbers
    of tokens are taken for square maps if both can be, with as many extra tokens. Other sequences, sound say, keep
    their one axis. Against a vector all positions are averaged.

    Args:
        one: Of shape (batch, channels, *positions).
        other: The same; channels and positions may differ.
        tokens: Whether each, where it is a sequence, is one of tokens.

    Raises:
        ValueError: Positions of so many axes can't be compared.
    """
    found = meeting(tuple(one.shape[2:]), tuple(other.shape[2:]), tokens=tokens)
    if found is None:
        raise ValueError(f"positions {list(one.shape[2:])} and {list(other.shape[2:])} cannot be compared")
    return _pooled(one, found[0], found[2]), _pooled(other, found[1], found[2])


def meeting(
    one: Positions, other: Positions, *, tokens: Tokens = (True, True)
) -> tuple[Positions, Positions, Positions] | None:
    """Return how each of two lies, and the positions at which they are compared; None if they can't be.

    Args:
        one: Positions of one feature.
        other: Positions of the other.
        tokens: Whether each, where it is a sequence, is one of tokens.
    """
    if one == other:
        return one, other, one
    if not one or not other:
        return one, other, ()
    if len(one) == 1 and len(other) == 2 and tokens[0]:
        one = _grid(one[0], other) or one
    elif len(one) == 2 and len(other) == 1 and tokens[1]:
        other = _grid(other[0], one) or other
    elif len(one) == len(other) == 1 and all(tokens):
        one, other = _squares(one[0], other[0]) or (one, other)
    if len(one) != len(other) or len(one) > len(_POOLING):
        return None
    return one, other, tuple(min(sizes) for sizes in zip(one, other, strict=True))


def _grid(tokens: int, like: Positions) -> Positions | None:
    """Return height and width, in the ratio of a map, of so many tokens, less the extra ones."""
    return next((grid for extra in range(_EXTRA_TOKENS) if (grid := _exact(tokens - extra, like))), None)


def _squares(one: int, other: int) -> tuple[Positions, Positions] | None:
    for extra in range(_EXTRA_TOKENS):
        first, second = (_exact(tokens - extra, (1, 1)) for tokens in (one, other))
        if first is not None and second is not None:
            return first, second
    return None


def _exact(tokens: int, like: Positions) -> Positions | None:
    height, width = like
    rows = round(math.sqrt(max(tokens, 0) * height / width))
    columns = tokens // rows if rows else 0
    return (rows, columns) if columns and rows * columns == tokens and rows * width == columns * height else None


def _pooled(value: Tensor, positions: Positions, target: Positions) -> Tensor:
    """Return a feature, laid out at some positions, averaged to others."""
    if value.ndim == 2:
        return value
    if not target:
        return value.flatten(2).mean(2)
    if tuple(value.shape[2:]) != positions:
        value = value[:, :, value.shape[2] - math.prod(positions) :].reshape(*value.shape[:2], *positions)
    if positions == target:
        return value
    pooled: Tensor = _POOLING[len(target) - 1](value, target)
    return pooled
