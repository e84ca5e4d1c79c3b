"""Counts what architectures cost, without building them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mil_cli.errors import ModelError
from mil_cli.spaces.architecture import Architecture
from mil_cli.spaces.blocks import Choice, Repeat
from mil_cli.spaces.decisions import join
from mil_cli.spaces.layers import Elastic
from mil_cli.spaces.space import DesignedSpace


class CostCounter:
    """Counts the multiply-accumulates and the parameters of the architectures of a space.

    The module runs on shapes alone, on a copy without weights; so its `forward` may not depend on values. What an
    operator, a block or a layer costs is remembered, so that few of them run for another architecture.

    Args:
        space: The space.
        args: Positional inputs of the module: one sample.
        kwargs: Named inputs.
    """

    def __init__(self, space: DesignedSpace, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        self._space = space
        self._shapes = DesignedSpace(copy.deepcopy(space.module).to("meta").eval())
        self._call = pytree.tree_map_only(
            Tensor, lambda one: one.detach().to("meta"), (tuple(args), dict(kwargs or {}))
        )
        self._macs = _MacCounter()
        for path, module in _remembered(self._shapes.module).items():
            holders = [decision.holder for decision in self._shapes.decisions if decision.touches(path)]
            _remember(module, holders, self._macs)

    def macs(self, architecture: Architecture) -> int:
        """Return the multiply-accumulates of one sample: convolutions, linear layers, matrix products, attention.

        Raises:
            ModelError: The module does not run on the sample, or its `forward` depends on values.
        """
        args, kwargs = self._call
        before = self._macs.total
        try:
            with self._shapes.active(architecture), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), self._macs:
                self._shapes.module(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as problem:
            raise ModelError(
                f"the architecture does not run on the shapes of a sample: {str(problem).splitlines()[0]}",
                value=str(architecture),
                hint="all operators of a Choice must take the same shapes and give the same shapes",
            ) from problem
        return self._macs.total - before

    def params(self, architecture: Architecture) -> int:
        """Return how many numbers the parameters of the built architecture hold; those tied count once."""
        counted: set[tuple[int, tuple[int, ...]]] = set()
        with self._space.active(architecture):
            for module in _running(self._space.module):
                sliced = module.tensors() if isinstance(module, Elastic) else {}
                for name, parameter in module.named_parameters(recurse=False):
                    counted.add((id(parameter), tuple(sliced.get(name, parameter).shape)))
        return sum(math.prod(shape) for _, shape in counted)


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the multiply-accumulates of what runs in it, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result) // 2
        return result


def _remembered(module: nn.Module) -> dict[str, nn.Module]:
    """Return operators, blocks, and layers without parts, by their paths."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, Choice | Repeat):
            found.update({join(path, name): child for name, child in part.named_children()})
        elif path and next(part.children(), None) is None:
            found[path] = part
    return found


def _remember(module: nn.Module, holders: Sequence[Any], counter: _MacCounter) -> None:
    """Make a module on shapes give what it gave before, where inputs have the same shapes and the same is active."""
    forward: Callable[..., Any] = module.forward
    known: dict[Any, tuple[int, Any]] = {}

    def remembering(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        shapes = tuple((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in leaves)
        key = (tuple(holder.chosen for holder in holders), shapes, tree)
        if key not in known:
            before = counter.total
            result = forward(*args, **kwargs)
            known[key] = (counter.total - before, result)
            return result
        macs, result = known[key]
        counter.total += macs
        return pytree.tree_map_only(Tensor, Tensor.detach, result)

    module.forward = remembering


def _running(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a plain copy has."""
    if isinstance(module, Choice):
        yield from _running(module.operator(module.decision.chosen))
        return
    yield module
    for child in module.running() if isinstance(module, Repeat) else module.children():
        yield from _running(child)
