"""One architecture of a space: what was chosen, by the name of the decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Chosen = str | int
"""What a decision gives: the name of an operator, or a number."""


class Architecture(Mapping[str, Chosen]):
    """What was chosen, by the name of the decision; only what acts is there.

    A decision inside an operator that was not chosen, or inside a block that does not run, changes nothing; it has no
    entry, so that architectures are equal where all their choices that act are.

    Args:
        choices: The choices, in the order of the space's decisions.
    """

    def __init__(self, choices: Mapping[str, Chosen]) -> None:
        self._choices = dict(choices)

    def __getitem__(self, name: str) -> Chosen:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return hash(frozenset(self._choices.items()))

    def __str__(self) -> str:
        return " ".join(f"{name}={choice}" for name, choice in self._choices.items())

    def __repr__(self) -> str:
        return f"Architecture({self._choices!r})"

    def to_json(self) -> dict[str, Chosen]:
        """Return the choices as a JSON object; `DesignedSpace.architecture` reads and checks it."""
        return dict(self._choices)
