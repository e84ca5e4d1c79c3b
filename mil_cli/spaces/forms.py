"""The forms of architectures: equal where two are the same plain module, whatever was chosen to get there.

A sequence without what does nothing is the same sequence, and a sequence inside another is part of it: a skip in the
second of three blocks and one in the third, or two blocks, are one form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mil_cli.spaces.blocks import Choice, OneOf, Repeat
from mil_cli.spaces.decisions import Decision, held_decisions, held_sizes, is_inside, join, own_sizes
from mil_cli.spaces.layers import Elastic
from mil_cli.spaces.plain import Searchable
from mil_cli.spaces.sizes import Chooser, Free, trying

Form = Hashable
"""What is equal for modules that are the same but for the values of their weights."""

_INTERNAL = frozenset(nn.Module().__dict__)


class Forms:
    """The forms of the architectures of a module.

    Args:
        module: The module.
        decisions: Its decisions.
    """

    def __init__(self, module: nn.Module, decisions: Sequence[Decision]) -> None:
        self._module = module
        self._decisions = decisions
        self._layers: dict[Hashable, Form] = {}
        self._known = {
            id(part): form
            for part in module.modules()
            if not any(_depends(inner) for inner in part.modules())
            for form in _Lister({}, None, {}, limit=1).all(part, "")
        }

    def active(self) -> Form:
        """Return the form of what is active."""
        return next(iter(_Lister(self._known, None, self._layers, limit=1).all(self._module, "")))

    def count(self, limit: int) -> int | None:
        """Return how many forms there are; None where more than `limit` were to be kept at once."""
        if any(len(one.places) > 1 for one in self._decisions if isinstance(one.holder, Repeat)):
            return None  # one that stands in two places is the same in both, which a list of each would miss
        try:
            return _Counter(self._module, self._decisions, self._known, self._layers, limit).count(self._module, "")
        except _TooManyError:
            return None


class _Counter:
    """Counts forms, without a list of all of them where parts of the module are independent.

    Args:
        module: The module.
        decisions: Its decisions.
        known: Forms of modules in which nothing can be chosen, by their identity.
        layers: Forms of torch's layers, by their class and arguments; it is added to.
        limit: Most forms of one part.
    """

    def __init__(
        self,
        module: nn.Module,
        decisions: Sequence[Decision],
        known: Mapping[int, Form],
        layers: dict[Hashable, Form],
        limit: int,
    ) -> None:
        self._module = module
        # A number is tried out in the smallest part that has all its places: elsewhere it changes nothing. So is what
        # several choices share.
        self._scopes: dict[str, list[Decision]] = {}
        for decision in decisions:
            shared = isinstance(decision.holder, OneOf) and len(decision.places) > 1
            if isinstance(decision.holder, Free) or shared:
                self._scopes.setdefault(_common([place.path for place in decision.places]), []).append(decision)
        self._lister = _Lister(
            known, {path: _choosers(held) for path, held in self._scopes.items()}, layers, limit=limit
        )
        self._counts: dict[Hashable, int] = {}

    def count(self, module: nn.Module, path: str) -> int:
        """Return how many forms a part has, given the numbers that are active outside.

        Given the numbers that they share, the parts of a part are independent; and other numbers give other forms where
        they show in a layer that always runs.

        Raises:
            _TooManyError: A part that has to be listed has more than the limit.
        """
        above = (
            one for scope, held in self._scopes.items() if scope != path and is_inside(path, scope) for one in held
        )
        key = (path, *(one.holder.chosen for one in above if one.touches(path)))
        if key not in self._counts:
            own = self._scopes.get(path, ())
            if isinstance(module, Searchable | nn.Sequential) or not all(self._shows(one) for one in own):
                self._counts[key] = len(self._lister.all(module, path))
            else:
                with trying(_choosers(own)) as each:
                    self._counts[key] = sum(self._product(module, path) for _ in each)
        return self._counts[key]

    def _product(self, module: nn.Module, path: str) -> int:
        return math.prod(self.count(child, join(path, name)) for name, child in module.named_children())

    def _shows(self, decision: Decision) -> bool:
        """Whether a layer that always runs has a number as it is."""
        layers = (self._module.get_submodule(place.path) for place in decision.places if not place.condition)
        sizes = (size for layer in layers if isinstance(layer, Elastic) for size in layer.sizes.values())
        return any(size is decision.holder for size in sizes)


class _TooManyError(Exception):
    """More forms than may be kept."""


class _Lister:
    """Lists the forms of modules.

    Args:
        known: Forms of modules in which nothing can be chosen, by their identity.
        scopes: What to try out in each module, by its path; None: only what is active is listed.
        layers: Forms of torch's layers, by their class and arguments; it is added to.
        limit: Most forms of one module.
    """

    def __init__(
        self,
        known: Mapping[int, Form],
        scopes: Mapping[str, Sequence[Chooser]] | None,
        layers: dict[Hashable, Form],
        *,
        limit: int,
    ) -> None:
        self._known = known
        self._scopes = scopes
        self._tried = {id(one) for scope in (scopes or {}).values() for one in scope}
        self._limit = limit
        self._layers = layers

    def all(self, module: nn.Module, path: str) -> set[Form]:
        """Return the forms of a module.

        Raises:
            _TooManyError: There are more than the limit.
        """
        if id(module) in self._known:
            return {self._known[id(module)]}
        if self._scopes is None:
            return self._here(module, path)
        found: set[Form] = set()
        scope = self._scopes.get(path, ())
        self._check(math.prod(len(one.choices) for one in scope))
        with trying(scope) as each:
            for _ in each:
                found |= self._here(module, path)
                self._check(len(found))
        return found

    def _here(self, module: nn.Module, path: str) -> set[Form]:
        """Return the forms of a module, given the numbers that are tried out in it."""
        if isinstance(module, Elastic):
            return {self._layer(module)}
        if type(module) is nn.Identity:
            return {_Sequence()}
        if isinstance(module, Choice):
            given = self._scopes is None or id(module.decision) in self._tried
            indices = [module.decision.chosen] if given else range(len(module.names))
            return set().union(*(self.all(module.operator(one), join(path, module.names[one])) for one in indices))
        if isinstance(module, Repeat):
            return self._sequences(module.running() if self._scopes is None else module, path, least=module.least)
        if type(module) is nn.Sequential:
            return self._sequences(module, path, least=len(module))
        parts = [self.all(child, join(path, name)) for name, child in module.named_children()]
        self._check(math.prod(map(len, parts)))
        names = tuple(name for name, _ in module.named_children())
        own = _own_form(module)
        return {(own, names, forms) for forms in itertools.product(*parts)}

    def _layer(self, module: Elastic) -> Form:
        """Return the form of an elastic layer: that of torch's, and what it does not show of what was chosen for it."""
        key = (module.torch_type, *module.arguments().items())
        if key not in self._layers:
            layer = module.torch_type(**module.arguments(), device="meta")
            self._layers[key] = (_own_form(layer), (), ())
        # Two and six of a product are another net than three and four, where a module splits it up.
        sizes = module.sizes.values()
        hidden = tuple(int(base) for size in sizes for base in size.bases if not any(base is one for one in sizes))
        return (self._layers[key], hidden) if hidden else self._layers[key]

    def _sequences(self, blocks: Iterable[nn.Module], path: str, *, least: int) -> set[Form]:
        """Return the forms of the first blocks, all or at least so many."""
        found: set[tuple[Form, ...]] = set()
        longer: set[tuple[Form, ...]] = {()}
        for index, block in enumerate(blocks):
            if index >= least and self._scopes is not None:
                found |= longer
            forms = [
                tuple(form) if isinstance(form, _Sequence) else (form,)
                for form in self.all(block, join(path, str(index)))
            ]
            self._check(len(longer) * len(forms))
            longer = {(*before, *form) for before in longer for form in forms}
        return {forms[0] if len(forms) == 1 else _Sequence(forms) for forms in found | longer}

    def _check(self, count: int) -> None:
        if count > self._limit:
            raise _TooManyError


class _Sequence(tuple[Form, ...]):
    """The form of modules that run one after another; empty for one that does nothing."""

    __slots__ = ()


def _own_form(module: nn.Module) -> Form:
    """Return what a module is without its parts: its class, its settings, the shapes of its own parameters."""
    named = {name for name, _ in (*held_sizes(module), *held_decisions(module))}
    settings = tuple(
        (name, _value(value))
        for name, value in module.__dict__.items()
        if name not in _INTERNAL and name not in named and f"{name}.0" not in named
    )
    sizes = tuple(int(size) for size in own_sizes(module))
    shapes = tuple((name, tuple(value.shape)) for name, value in module._parameters.items() if value is not None)
    # The buffers of torch's layers are statistics; another module's may be what makes it what it is.
    fixed = () if type(module).__module__.startswith("torch.") else tuple(map(id, module._buffers.values()))
    return type(module), settings, sizes, shapes, fixed


def _value(value: Any) -> Form:
    """Return a setting so that equal ones are equal; what has no values to compare is only equal to itself."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | type):
        return value
    if isinstance(value, list | tuple):
        return tuple(_value(one) for one in value)
    if isinstance(value, dict):
        return tuple((key, _value(one)) for key, one in value.items())
    return id(value)


def _depends(module: nn.Module) -> bool:
    """Whether a module itself depends on choices."""
    return isinstance(module, Searchable) or bool(held_sizes(module))


def _common(paths: Sequence[str]) -> str:
    """Return the path of the smallest module that holds those of some paths."""
    split = [path.split(".") if path else [] for path in paths]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*split, strict=False))
    return ".".join(level[0] for level in same)


def _choosers(decisions: Iterable[Decision]) -> list[Chooser]:
    return [decision.holder for decision in decisions if not isinstance(decision.holder, Repeat)]
