"""A search space that a user designed: a module that holds choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError, did_you_mean
from mil_cli.spaces.architecture import Architecture
from mil_cli.spaces.blocks import Choice, OneOf
from mil_cli.spaces.decisions import Decision, decision_order, find_decisions
from mil_cli.spaces.forms import Form, Forms
from mil_cli.spaces.initialise import initialise
from mil_cli.spaces.layers import KernelMaps
from mil_cli.spaces.plain import plain_copy


class DesignedSpace:
    """All architectures of a module that holds `Choice`, `Repeat`, `Width` or `Kernel`.

    Args:
        module: The module; it has the weights that the architectures share.

    Attributes:
        module: The module.
        decisions: What is to be chosen, in the order of the submodules.

    Raises:
        ModelError: The module holds no choice.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.decisions = find_decisions(module)
        if not self.decisions:
            hint = "put a Choice, Repeat, Width or Kernel of mil_cli.spaces into it, or take nas/elastic as it is"
            raise ModelError("the module has nothing to choose from", value=type(module).__name__, hint=hint)
        self._order = decision_order(self.decisions)
        self._numbers = {decision.name: number for number, decision in enumerate(self.decisions)}
        self._forms = Forms(module, self.decisions)

    # Architectures of the space.

    @cached_property
    def size(self) -> int:
        """How many combinations of choices there are, counting those that differ only where nothing acts."""
        return math.prod(len(decision.choices) for decision in self.decisions)

    def distinct(self, *, limit: int = 1_000_000) -> int | None:
        """Return how many plain modules there are that differ; None where more than `limit` were to be kept in mind."""
        return self._forms.count(limit)

    def form(self, architecture: Architecture) -> Form:
        """Return what is equal for architectures that are the same plain module; of use within one process.

        In sequences an operator that does nothing (`torch.nn.Identity`) does not count.
        """
        with self.active(architecture):
            return self._forms.active()

    def unique(self, architectures: Iterable[Architecture]) -> list[Architecture]:
        """Return the first of each set of architectures that are the same plain module."""
        first: dict[Form, Architecture] = {}
        for architecture in architectures:
            first.setdefault(self.form(architecture), architecture)
        return list(first.values())

    def architecture(self, choices: Mapping[str, object]) -> Architecture:
        """Return the architecture that some choices make; those that do not act may be missing and are left out.

        Args:
            choices: By the name of the decision, as from `Architecture.to_json`.

        Raises:
            ModelError: There is no such decision or choice, or one that acts is missing.
        """
        if not isinstance(choices, Mapping):
            raise ModelError("an architecture is an object with the choice of each decision", value=choices)
        for name in choices:
            if name not in self._numbers:
                raise ModelError(
                    "the space has no such decision", value=name, hint=did_you_mean(str(name), self._numbers)
                )
        return self._settle(lambda number: self._index(number, choices))

    @cached_property
    def smallest(self) -> Architecture:
        """The smallest sizes, the fewest blocks, the operators with the fewest parameters."""
        return self._settle(lambda number: self._by_size(number)[0])

    @cached_property
    def largest(self) -> Architecture:
        """The largest sizes, the most blocks, the operators with the most parameters."""
        return self.at(self.largest_choices)

    @cached_property
    def largest_choices(self) -> tuple[int, ...]:
        """The index of the largest choice of every decision, whether or not it acts in the largest architecture."""
        return tuple(self._by_size(number)[-1] for number in range(len(self.decisions)))

    def sample(self, generator: torch.Generator) -> Architecture:
        """Draw an architecture: each decision that acts is drawn by itself, all its choices equally likely."""
        return self._settle(lambda number: self._draw(len(self.decisions[number].choices), generator))

    def mutate(self, architecture: Architecture, generator: torch.Generator, *, probability: float) -> Architecture:
        """Return an architecture some of whose decisions changed, each with the probability given, at least one.

        What comes to act is drawn. Where no decision has a second choice, it is the same architecture.
        """
        chosen = self._indices(architecture)
        movable = [number for number in chosen if len(self.decisions[number].choices) > 1]
        draws = dict(zip(movable, torch.rand(len(movable), generator=generator).tolist(), strict=True))
        moved = {number for number, draw in draws.items() if draw < probability}
        moved = moved or set(sorted(movable, key=draws.__getitem__)[:1])

        def choose(number: int) -> int:
            count = len(self.decisions[number].choices)
            if number in moved:
                return (chosen[number] + 1 + self._draw(count - 1, generator)) % count
            return chosen[number] if number in chosen else self._draw(count, generator)

        return self._settle(choose)

    def cross(self, first: Architecture, second: Architecture, generator: torch.Generator) -> Architecture:
        """Return an architecture that has each decision from one of two, from the other where it acts in that alone."""
        parents = (self._indices(first), self._indices(second))
        coins = torch.randint(2, (len(self.decisions),), generator=generator).tolist()

        def choose(number: int) -> int:
            for parent in (parents[coins[number]], parents[1 - coins[number]]):
                if number in parent:
                    return parent[number]
            return self._draw(len(self.decisions[number].choices), generator)

        return self._settle(choose)

    # Numbers for predictors and for searches.

    @cached_property
    def encoding_names(self) -> tuple[str, ...]:
        """What the places of an encoding stand for, such as ``stage.op=conv3``."""
        return tuple(f"{decision.name}={choice}" for decision in self.decisions for choice in decision.choices)

    def encode(self, architecture: Architecture) -> np.ndarray:
        """Return an architecture as numbers (choices of all decisions,): 1 where chosen; 0 for what does not act."""
        chosen = self._indices(architecture)
        return np.array(
            [
                float(chosen.get(number) == index)
                for number, decision in enumerate(self.decisions)
                for index in range(len(decision.choices))
            ],
            dtype=np.float32,
        )

    def indices(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the index of the choice of every decision, 0 for what does not act."""
        chosen = self._indices(architecture)
        return tuple(chosen.get(number, 0) for number in range(len(self.decisions)))

    def at(self, indices: Sequence[int]) -> Architecture:
        """Return the architecture that `indices` gave numbers for."""
        return self._settle(indices.__getitem__)

    # Running and building.

    def choices_of(self, decision: Decision) -> list[Choice]:
        """Return the parts of the module whose operator a decision chooses; none if it chooses something else."""
        parts = [self.module.get_submodule(place.path) for place in decision.places]
        return [part for part in dict.fromkeys(parts) if isinstance(part, Choice) and part.decision is decision.holder]

    @contextmanager
    def active(self, architecture: Architecture) -> Iterator[None]:
        """Make `module` run an architecture, on the weights that all share; gradients reach only what runs.

        Raises:
            ModelError: The architecture is not one of this space.
        """
        chosen = self._indices(architecture)
        before = [decision.holder.chosen for decision in self.decisions]
        try:
            for number, index in chosen.items():
                self.decisions[number].holder.chosen = index
            yield
        finally:
            for decision, index in zip(self.decisions, before, strict=True):
                decision.holder.chosen = index

    @contextmanager
    def mixed(self, weights: Mapping[str, Tensor], *, share: int = 1) -> Iterator[None]:
        """Make operators run all at once, as weighted sums.

        Args:
            weights: By the name of a decision between operators: a weight for each (operators,); gradients reach them.
            share: One of so many channels passes through the operators, the others pass by; see `Choice`.

        Raises:
            ModelError: There is no such decision, there are not as many weights as operators, or the operators cannot
                run on so few channels.
        """
        choices = {decision.name: decision.holder for decision in self.decisions if isinstance(decision.holder, OneOf)}
        for name, vector in weights.items():
            if name not in choices:
                raise ModelError("the space has no such Choice", value=name, hint=did_you_mean(name, choices))
            if tuple(vector.shape) != (len(choices[name].choices),):
                raise ModelError(
                    f"needs one weight for each of its {len(choices[name].choices)} operators",
                    where=name,
                    value=tuple(vector.shape),
                )
            self._check_share(name, share)
        before = {name: (choices[name].mix, choices[name].share) for name in weights}
        try:
            for name, vector in weights.items():
                choices[name].mix, choices[name].share = vector.unbind(), share
            yield
        finally:
            for name, (mix, whole) in before.items():
                choices[name].mix, choices[name].share = mix, whole

    def build(self, architecture: Architecture, *, seed: int = 0, inherit: bool = False) -> nn.Module:
        """Return an architecture as a plain module, with torch's layers in place of all that can be chosen.

        Args:
            architecture: The architecture.
            seed: Of fresh weights: each module's own ``reset_parameters`` draws them, parts before the whole, as they
                would be drawn if the layers were made one after another.
            inherit: Whether the weights are copied out of the shared ones instead.

        Raises:
            ModelError: The architecture is not one of this space, or a module has weights of its own and no
                ``reset_parameters``.
        """
        with self.active(architecture):
            result = plain_copy(self.module)
        if not inherit:
            initialise(result, seed=seed)
        return result

    # Parts.

    def _check_share(self, name: str, share: int) -> None:
        """Refuse a share of the channels that the operators of a decision cannot run on."""
        for choice in self.choices_of(self.decisions[self._numbers[name]]) if share > 1 else ():
            if choice.width is None or choice.width.largest % share:
                raise ModelError(
                    f"its operators cannot run on one of {share} channels",
                    where=name,
                    value=choice.width,
                    hint="give each Choice the width that its layers are made of: a Channels that the share divides",
                )

    def _settle(self, choose: Callable[[int], int]) -> Architecture:
        """Ask for the choice of each decision that acts, those that others depend on first."""
        chosen: dict[int, int] = {}
        for number in self._order:
            if self.decisions[number].acts(chosen):
                chosen[number] = choose(number)
        names = {number: self.decisions[number] for number in sorted(chosen)}
        return Architecture({one.name: one.choices[chosen[number]] for number, one in names.items()})

    def _indices(self, architecture: Architecture) -> dict[int, int]:
        """Return the indices of an architecture's choices, by the number of the decision."""
        indices = {}
        for name in architecture:
            if name not in self._numbers:
                hint = did_you_mean(name, self._numbers)
                raise ModelError("the architecture is of another space: no such decision", value=name, hint=hint)
            indices[self._numbers[name]] = self._index(self._numbers[name], architecture)
        return indices

    def _index(self, number: int, choices: Mapping[str, object]) -> int:
        decision = self.decisions[number]
        if decision.name not in choices:
            shown = ", ".join(map(str, decision.choices))
            raise ModelError("the choice of this decision is missing", where=decision.name, hint=f"choose from {shown}")
        choice = choices[decision.name]
        for index, known in enumerate(decision.choices):
            if type(choice) is type(known) and choice == known:
                return index
        raise ModelError(
            "no such choice",
            where=decision.name,
            value=choice,
            hint=did_you_mean(str(choice), map(str, decision.choices)),
        )

    def _by_size(self, number: int) -> list[int]:
        """Return the indices of a decision's choices from the smallest to the largest."""
        indices = list(range(len(self.decisions[number].choices)))
        choices = self.choices_of(self.decisions[number])
        if not choices:
            return indices
        params = [sum(_params(choice.operator(index)) for choice in choices) for index in indices]
        return sorted(indices, key=params.__getitem__)

    @staticmethod
    def _draw(count: int, generator: torch.Generator) -> int:
        return int(torch.randint(count, (), generator=generator))


def _params(operator: nn.Module) -> int:
    """Return how many numbers the parameters of an operator hold, without maps of kernels, which no built one has."""
    maps = (part for part in operator.modules() if isinstance(part, KernelMaps))
    counted, left_out = (
        sum(parameter.numel() for part in parts for parameter in part.parameters()) for parts in ([operator], maps)
    )
    return counted - left_out
