"""Counts what architectures cost, and what work they do, without building them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mil_cli.errors import MilError, ModelError
from mil_cli.spaces.architecture import Architecture
from mil_cli.spaces.blocks import Choice, Repeat
from mil_cli.spaces.decisions import join
from mil_cli.spaces.layers import Conv2d, Elastic, KernelMaps
from mil_cli.spaces.space import DesignedSpace

_MACS, _ELEMENTS, _CALLS = "macs", "elements", "calls"


class CostCounter:
    """Counts the multiply-accumulates, the parameters and the work of the architectures of a space.

    The module runs on shapes alone, on a copy without weights; so its `forward` may not depend on values. What an
    operator, a block or a layer costs is remembered, so that few of them run for another architecture.

    Args:
        space: The space.
        args: Positional inputs of the module: one sample.
        kwargs: Named inputs.
    """

    def __init__(self, space: DesignedSpace, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        self._space = space
        shapes = copy.deepcopy(space.module).to("meta").eval()
        for layer in shapes.modules():
            if isinstance(layer, Conv2d):
                layer.maps = None  # no built module has them
        self._shapes = DesignedSpace(shapes)
        self._call = shapes_of(args, kwargs)
        self._counted = _WorkCounter()
        for path, module in _remembered(self._shapes.module).items():
            holders = [decision.holder for decision in self._shapes.decisions if decision.touches(path)]
            _remember(module, holders, self._counted)

    def macs(self, architecture: Architecture) -> int:
        """Return the multiply-accumulates of one sample: convolutions, linear layers, matrix products, attention.

        Raises:
            ModelError: The module does not run on the sample, or its `forward` depends on values.
        """
        return sum(count for (_, what), count in self._run(architecture).items() if what == _MACS)

    def check(self) -> None:
        """Run each choice of each decision at least once.

        Raises:
            ModelError: As `macs` does.
        """
        for architecture in dict.fromkeys(_covering(self._space)):
            self.macs(architecture)

    def work(self, architecture: Architecture) -> dict[str, int]:
        """Return the work of one sample by its kind, from which a runtime's latency can be predicted.

        Dense, pointwise and grouped convolutions, products and all else each have ``macs``, ``elements`` that they read
        and write beside weights, and ``calls``, such as ``pointwise.elements``. What a runtime leaves out, a batch norm
        that is folded or another view of the same numbers, is no work.

        Raises:
            ModelError: As `macs` does.
        """
        return {f"{kind}.{what}": count for (kind, what), count in sorted(self._run(architecture).items())}

    def _run(self, architecture: Architecture) -> Counter[tuple[str, str]]:
        args, kwargs = self._call
        counted = self._counted.work = Counter()
        with (
            running_on_shapes(architecture),
            self._shapes.active(architecture),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            self._counted,
        ):
            self._shapes.module(*args, **kwargs)
        return counted

    def params(self, architecture: Architecture) -> int:
        """Return how many numbers the parameters of the built architecture hold; those tied count once."""
        counted: set[tuple[int, tuple[int, ...]]] = set()
        with self._space.active(architecture):
            for module in _running(self._space.module):
                sliced = module.tensors() if isinstance(module, Elastic) else {}
                for name, parameter in module.named_parameters(recurse=False):
                    counted.add((id(parameter), tuple(sliced.get(name, parameter).shape)))
        return sum(math.prod(shape) for _, shape in counted)


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs of a module with their tensors on the meta device."""
    call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda one: one.detach().to("meta"), (tuple(args), dict(kwargs or {}))
    )
    return call


@contextmanager
def running_on_shapes(architecture: Architecture) -> Iterator[None]:
    """Tell what an architecture that does not run on shapes alone is told as.

    Raises:
        ModelError: It does not run on the sample, or its `forward` depends on values.
    """
    try:
        yield
    except MilError:
        raise
    except Exception as problem:  # what a user's own forward raises is anyone's guess
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        raise ModelError(
            f"the architecture does not run on the shapes of a sample: {reason}",
            value=str(architecture),
            hint="all operators of a Choice must take the same shapes and give the same shapes",
        ) from problem


class _WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the work of what runs in it, multiply-accumulates by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _kind(func, args)
        if kind is not None:
            formula = flop_registry.get(func.overloadpacket)
            if formula is not None:
                self.work[kind, _MACS] += formula(*args, **(kwargs or {}), out_val=result) // 2
            elements = _elements(kind, func, args) + sum(_sizes(result))
            self.work[kind, _ELEMENTS] += elements
            self.work[kind, _CALLS] += elements > 0
        return result


def _kind(func: Any, args: Sequence[Any]) -> str | None:
    """Return what kind of work an operator is; None for what a runtime leaves out."""
    name = func.overloadpacket.__name__
    if name == "convolution":
        weight, groups = args[1], args[8]
        pointwise = math.prod(weight.shape[2:]) == 1
        return "grouped" if groups > 1 else "pointwise" if pointwise else "dense"
    if func.overloadpacket in flop_registry:
        return "product"
    return None if func.is_view or "batch_norm" in name or name in _FREE else "other"


_FREE = frozenset({"clone", "detach", "_to_copy", "native_dropout", "alias"})


def _elements(kind: str, func: Any, args: Sequence[Any]) -> int:
    """Return how many numbers an operator reads, of a layer those that are no weights."""
    read = args[1:2] if func.overloadpacket.__name__ == "addmm" else args[:1] if kind != "other" else args
    return sum(_sizes(read))


def _sizes(values: Any) -> list[int]:
    return [one.numel() for one in pytree.tree_leaves(values) if isinstance(one, Tensor)]


def _remembered(module: nn.Module) -> dict[str, nn.Module]:
    """Return operators, blocks, and layers without parts, by their paths."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, Choice | Repeat):
            found.update({join(path, name): child for name, child in part.named_children()})
        elif path and next(part.children(), None) is None:
            found[path] = part
    return found


def _remember(module: nn.Module, holders: Sequence[Any], counter: _WorkCounter) -> None:
    """Make a module on shapes give what it gave before, where inputs have the same shapes and the same is active."""
    forward: Callable[..., Any] = module.forward
    known: dict[Any, tuple[Counter[tuple[str, str]], Any]] = {}

    def remembering(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        shapes = tuple((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in leaves)
        key = (tuple(holder.chosen for holder in holders), shapes, tree)
        if key not in known:
            outside, counter.work = counter.work, Counter()
            try:
                result = forward(*args, **kwargs)
            finally:
                outside.update(counter.work)
                inside, counter.work = counter.work, outside
            known[key] = (inside, result)
            return result
        inside, result = known[key]
        counter.work.update(inside)
        return pytree.tree_map_only(Tensor, Tensor.detach, result)

    module.forward = remembering


def _covering(space: DesignedSpace) -> Iterator[Architecture]:
    """Yield for each choice of each decision an architecture that has it and is else as large as it can be."""
    for number, decision in enumerate(space.decisions):
        for index in range(len(decision.choices)):
            indices = list(space.largest_choices)
            for other, allowed in decision.places[0].condition:
                indices[other] = max(allowed)
            indices[number] = index
            yield space.at(indices)


def _running(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a plain copy has."""
    if isinstance(module, Choice):
        yield from _running(module.operator(module.decision.chosen))
        return
    yield module
    for child in module.running() if isinstance(module, Repeat) else module.children():
        if not isinstance(child, KernelMaps):
            yield from _running(child)
