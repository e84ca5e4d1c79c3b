"""Numbers that a search may choose: widths, kernel sizes, and what is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, Protocol

from mil_cli.errors import ModelError
from mil_cli.spaces.plain import Searchable


class Size(Searchable):
    """A whole number above 0 that depends on the architecture; `int` of it is what is active.

    ``width * 4``, ``width * expansion`` and ``kernel // 2`` are sizes too.
    """

    @property
    def bases(self) -> tuple[Free, ...]:
        """The numbers chosen that it is computed from, each once."""
        raise NotImplementedError

    def __int__(self) -> int:
        raise NotImplementedError

    @property
    def largest(self) -> int:
        """Its value where all that it is computed from is at its largest."""
        raise NotImplementedError

    def __mul__(self, other: int | Size) -> Size:
        return Computed(operator.mul, self, other) if isinstance(other, int | Size) else NotImplemented

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Size:
        return Computed(operator.floordiv, self, other) if isinstance(other, int) else NotImplemented

    def plain(self, memo: dict[int, Any]) -> int:
        """Return the active value."""
        return int(self)


class Channels(Size):
    """A number of channels that is not chosen, but of which a search may run the first ones alone for a while.

    Args:
        count: The number.

    Raises:
        ModelError: It is no whole number above 0.
    """

    def __init__(self, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ModelError("must be a whole number of at least 1", where="Channels", value=count)
        self._count = self._active = count

    @property
    def bases(self) -> tuple[Free, ...]:
        """Nothing."""
        return ()

    def __int__(self) -> int:
        return self._active

    @property
    def largest(self) -> int:
        """The number."""
        return self._count

    @contextmanager
    def narrowed(self, count: int) -> Iterator[None]:
        """Make it a smaller number as long as the context is open."""
        before, self._active = self._active, count
        try:
            yield
        finally:
            self._active = before

    def __repr__(self) -> str:
        return f"Channels({self._count})"


class Free(Size):
    """A number that is chosen; every layer that is given the same object has the same one.

    Args:
        choices: What it may be; kept in ascending order.

    Attributes:
        choices: What it may be.
        chosen: Which of them is active, as an index; the largest unless an architecture says otherwise.

    Raises:
        ModelError: The choices are not different whole numbers above 0.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        kind = type(self).__name__
        if isinstance(choices, int | str) or not choices:
            raise ModelError("needs a list of numbers to choose from", where=kind, value=choices)
        for choice in choices:
            if isinstance(choice, bool) or not isinstance(choice, int) or choice < 1:
                raise ModelError("a choice must be a whole number of at least 1", where=kind, value=choice)
        if len(set(choices)) < len(choices):
            raise ModelError("a choice is named twice", where=kind, value=list(choices), hint="name each number once")
        self.choices = tuple(sorted(choices))
        self.chosen = len(self.choices) - 1

    @property
    def bases(self) -> tuple[Free, ...]:
        """Itself."""
        return (self,)

    def __int__(self) -> int:
        return self.choices[self.chosen]

    @property
    def largest(self) -> int:
        """The largest choice."""
        return self.choices[-1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.choices)})"


class Width(Free):
    """A number of channels or features, or a factor of one: layers keep the first ones of the largest.

    ``Width([16, 32])`` given to several layers makes them agree; a second ``Width([16, 32])`` is a choice of its own.
    """


class Kernel(Free):
    """The size of a square kernel: a smaller one is the centre of the largest (Cai et al. 2020, "Once-for-All").

    Args:
        choices: What it may be.
        transformed: Whether each layer learns for each smaller size a linear map from the centre of the next larger
            kernel to its own, the same for all channels, as that paper has it; the map begins as the identity.

    Raises:
        ModelError: Even and odd sizes are mixed: a smaller one would have no centre.
    """

    def __init__(self, choices: Sequence[int], *, transformed: bool = False) -> None:
        super().__init__(choices)
        self.transformed = transformed
        if len({choice % 2 for choice in self.choices}) > 1:
            raise ModelError(
                "kernel sizes must be all odd or all even, so that a smaller one is the centre of a larger one",
                where="Kernel",
                value=list(choices),
                hint="use odd sizes, such as [3, 5, 7]",
            )


class Computed(Size):
    """What a product or a whole quotient of sizes gives.

    Args:
        operation: Of the module `operator`.
        left: The first operand.
        right: The second operand.
    """

    def __init__(self, operation: Callable[[int, int], int], left: Size, right: int | Size) -> None:
        self._operation, self._left, self._right = operation, left, right

    @property
    def bases(self) -> tuple[Free, ...]:
        """The numbers chosen that it is computed from, each once."""
        right = self._right.bases if isinstance(self._right, Size) else ()
        return tuple(dict.fromkeys((*self._left.bases, *right)))

    def __int__(self) -> int:
        return self._operation(int(self._left), int(self._right))

    @property
    def largest(self) -> int:
        """Its value where all that it is computed from is at its largest."""
        return self._operation(self._left.largest, largest(self._right))

    def __repr__(self) -> str:
        return f"{self._operation.__name__}({self._left!r}, {self._right!r})"


def largest(value: int | Size) -> int:
    """Return the largest value that a size may take; a number is its own."""
    return value.largest if isinstance(value, Size) else value


class Chooser(Protocol):
    """What keeps which of some choices is active."""

    choices: tuple[Any, ...]
    chosen: int


@contextmanager
def combinations(sizes: Sequence[Size]) -> Iterator[Iterator[None]]:
    """Give an iterator that makes every combination of some sizes' choices active in turn, and undo that at the end."""
    with trying(tuple(dict.fromkeys(base for size in sizes for base in size.bases))) as each:
        yield each


@contextmanager
def trying(choosers: Sequence[Chooser]) -> Iterator[Iterator[None]]:
    """Give an iterator that makes every combination of choices active in turn, and undo that at the end."""
    before = [one.chosen for one in choosers]

    def each() -> Iterator[None]:
        for chosen in product(*(range(len(one.choices)) for one in choosers)):
            for one, index in zip(choosers, chosen, strict=True):
                one.chosen = index
            yield

    try:
        yield each()
    finally:
        for one, index in zip(choosers, before, strict=True):
            one.chosen = index
