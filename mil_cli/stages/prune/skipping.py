"""Weights that a recipe asks to leave as they are, by names and patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from mil_cli.errors import StageError, did_you_mean


def skipped(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a weight is to be left as it is."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], *, where: str) -> None:
    """Check that each pattern says something.

    Args:
        patterns: Names of weights, or patterns with ``*``.
        names: The weights that there are.
        where: The stage that has them.

    Raises:
        StageError: One fits none of the weights.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = did_you_mean(pattern, names)
            raise StageError(f"'{pattern}' fits no weight of a layer", where=f"{where}.skip", value=pattern, hint=hint)
