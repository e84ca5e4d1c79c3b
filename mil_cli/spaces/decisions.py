"""Finds the decisions of a module, and under which other choices each of them acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from typing import TypeVar

from torch import nn

from mil_cli.errors import ModelError
from mil_cli.spaces.architecture import Chosen
from mil_cli.spaces.blocks import Choice, OneOf, Repeat
from mil_cli.spaces.layers import Elastic
from mil_cli.spaces.sizes import Free, Size

H = TypeVar("H")

Condition = tuple[tuple[int, frozenset[int]], ...]
"""Choices that go together: the number of a decision, and which of its choices, as indices. Empty: always."""


@dataclass(frozen=True)
class Place:
    """A module that a decision changes.

    Attributes:
        path: Its path.
        condition: When it runs.
    """

    path: str
    condition: Condition


@dataclass(frozen=True)
class Decision:
    """Something to be chosen.

    Attributes:
        name: The path of the module; of a number or of what several choices share, that of the attribute that has it,
            else of the first layer and its argument that it stands for, or of the first choice.
        choices: What there is to choose from: names of operators, numbers of blocks, sizes.
        holder: The part of the module that keeps what is active.
        places: The modules that it changes; it acts where one of them runs.
    """

    name: str
    choices: tuple[Chosen, ...]
    holder: OneOf | Repeat | Free
    places: tuple[Place, ...]

    @cached_property
    def _conditions(self) -> frozenset[Condition]:
        return frozenset(place.condition for place in self.places)

    def acts(self, chosen: Mapping[int, int]) -> bool:
        """Whether it changes anything, given the choices of the decisions that it depends on, as indices by number."""
        return any(all(chosen.get(number) in allowed for number, allowed in one) for one in self._conditions)

    @cached_property
    def depends_on(self) -> frozenset[int]:
        """The numbers of the decisions that say whether it acts."""
        return frozenset(number for condition in self._conditions for number, _ in condition)

    def touches(self, path: str) -> bool:
        """Whether it changes the module of a path, or one inside that."""
        return any(is_inside(place.path, path) for place in self.places)


def find_decisions(module: nn.Module) -> tuple[Decision, ...]:
    """Return the decisions of a module, in the order of its submodules."""
    finder = _Finder()
    finder.visit(module, "", ())
    return tuple(
        Decision(entry.name, _choices(entry.holder), entry.holder, tuple(entry.places))
        for entry in finder.found.values()
    )


def decision_order(decisions: tuple[Decision, ...]) -> tuple[int, ...]:
    """Return the numbers of decisions so that each comes after those that it depends on, else in their order.

    Raises:
        ModelError: Some depend on each other in a circle.
    """
    order: list[int] = []
    waiting = list(range(len(decisions)))
    while waiting:
        following = next((number for number in waiting if decisions[number].depends_on <= set(order)), None)
        if following is None:
            raise ModelError(
                "a decision says whether it is made itself",
                value=", ".join(decisions[number].name for number in waiting),
                hint="no operator may hold a Choice with the decision that the operator itself is chosen by",
            )
        waiting.remove(following)
        order.append(following)
    return tuple(order)


def join(path: str, name: str) -> str:
    """Return the dotted path of a part."""
    return f"{path}.{name}" if path else name


def is_inside(path: str, whole: str) -> bool:
    """Whether a path is that of a module or of a part of it."""
    return not whole or f"{path}.".startswith(f"{whole}.")


def held_sizes(module: nn.Module) -> list[tuple[str, Size]]:
    """Return the sizes that a module has as attributes, or in lists, with their names."""
    return _held(module, Size)


def held_decisions(module: nn.Module) -> list[tuple[str, OneOf]]:
    """Return the decisions between operators that a module has as attributes for choices inside it, as `held_sizes`."""
    return [] if isinstance(module, Choice) else _held(module, OneOf)


def _held(module: nn.Module, kind: type[H]) -> list[tuple[str, H]]:
    found = []
    for name, value in module.__dict__.items():
        several = isinstance(value, list | tuple)
        for index, one in enumerate(value if several else [value]):
            if isinstance(one, kind):
                found.append((f"{name}.{index}" if several else name, one))
    return found


def own_sizes(module: nn.Module) -> list[Size]:
    """Return the sizes that a module has for its own `forward`: no layer inside it is given what they come from."""
    held = held_sizes(module)
    layers = [layer for layer in module.modules() if isinstance(layer, Elastic)] if held else []
    given = {base for layer in layers for size in layer.sizes.values() for base in size.bases}
    return [size for _, size in held if not given.issuperset(size.bases)]


@dataclass
class _Entry:
    name: str
    holder: OneOf | Repeat | Free
    places: list[Place] = field(default_factory=list)


class _Finder:
    """Walks a module along all paths; a part that has several acts where one of them does."""

    def __init__(self) -> None:
        self.found: dict[int, _Entry] = {}
        self._numbers: dict[int, int] = {}
        self._attributes: dict[int, str] = {}

    def visit(self, module: nn.Module, path: str, condition: Condition) -> None:
        own = own_sizes(module)
        for name, decision in held_decisions(module):
            self._attributes.setdefault(id(decision), join(path, name))
        for name, size in held_sizes(module):
            self._attributes.setdefault(id(size), join(path, name))
            for base in size.bases if size in own else ():
                self._note(base, join(path, name), path, condition)
        if isinstance(module, Elastic):
            for argument, value in module.sizes.items():
                for base in value.bases:
                    self._note(base, join(path, argument), path, condition)
        if isinstance(module, Choice):
            number = self._note(module.decision, path, path, condition)
            for index, name in enumerate(module.names):
                self.visit(module.operator(index), join(path, name), (*condition, (number, frozenset({index}))))
        elif isinstance(module, Repeat):
            number = self._note(module, path, path, condition)
            for index, block in enumerate(module):
                needed = frozenset(range(max(index - module.least + 1, 0), len(module) - module.least + 1))
                runs: Condition = () if index < module.least else ((number, needed),)
                self.visit(block, join(path, str(index)), (*condition, *runs))
        else:
            for name, child in module.named_children():
                self.visit(child, join(path, name), condition)

    def _note(self, holder: OneOf | Repeat | Free, name: str, path: str, condition: Condition) -> int:
        if id(holder) not in self.found:
            taken = {entry.name for entry in self.found.values()}
            name = self._attributes.get(id(holder), name)
            # Two numbers may be new in one argument, as in Conv2d(8, width * expansion, 1).
            free = next(one for one in chain([name], (f"{name}.{number}" for number in count(2))) if one not in taken)
            self._numbers[id(holder)] = len(self.found)
            self.found[id(holder)] = _Entry(free, holder)
        self.found[id(holder)].places.append(Place(path, condition))
        return self._numbers[id(holder)]


def _choices(holder: OneOf | Repeat | Free) -> tuple[Chosen, ...]:
    match holder:
        case Repeat():
            return tuple(range(holder.least, len(holder) + 1))
        case OneOf() | Free():
            return holder.choices
