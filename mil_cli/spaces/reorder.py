"""Puts the channels of which smaller widths keep the first ones in order: those that matter most come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mil_cli.spaces.decisions import join
from mil_cli.spaces.layers import Conv2d, Elastic
from mil_cli.spaces.sizes import Size
from mil_cli.spaces.space import DesignedSpace

_MAKES = frozenset({"out_channels", "out_features"})
_NORMALISES = frozenset({"num_features", "normalized_shape"})
_READS = frozenset({"in_channels", "in_features"})

_TOLERANCE = 1e-4

Axes = list[tuple[Tensor, int]]
"""Parameters and buffers with the axis along which they have some channels."""


@torch.no_grad()
def reorder_channels(space: DesignedSpace, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """Order the channels of each size by the L1 norm of the weights that make them, the largest first, in place.

    Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (arXiv:1908.09791),
    section 3.2. A smaller width is the first channels of the largest, so that these should be the ones that matter. The
    largest architecture computes what it did; channels keep their order where it would not, since something tells them
    apart: they are flattened with their maps, are made of heads, or meet channels that stay.

    Args:
        space: The space; the weights of its module change.
        args: Positional inputs of the module on which its outputs are compared.
        kwargs: Named inputs.

    Returns:
        What was put in order, each by the first layer and argument that has it: ``stem.0.out_channels``.
    """
    module = space.module
    was_training = module.training
    module.eval()
    try:
        with space.active(space.largest):
            expected = _outputs(module, args, kwargs)
            done = []
            for name, size in _sizes(module).items():
                axes = _axes(module, size)
                if axes is None:
                    continue
                order = _importance(module, size).argsort(descending=True, stable=True)
                _permute(axes, order)
                if _close(_outputs(module, args, kwargs), expected):
                    done.append(name)
                else:
                    _permute(axes, order.argsort())
            return done
    finally:
        module.train(was_training)


def _sizes(module: nn.Module) -> dict[str, Size]:
    """Return the sizes that make channels and may be smaller, each by the first layer and argument that has it."""
    found: dict[int, tuple[str, Size]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, Elastic):
            for argument, size in layer.sizes.items():
                if argument in _MAKES and size.bases:
                    found.setdefault(id(size), (join(path, argument), size))
    return dict(found.values())


def _layers(module: nn.Module, size: Size) -> Iterator[tuple[Elastic, set[str]]]:
    """Yield the layers that have a size as such, with the arguments that it stands for."""
    for layer in module.modules():
        if isinstance(layer, Elastic):
            arguments = {argument for argument, held in layer.sizes.items() if held is size}
            if arguments:
                yield layer, arguments


def _axes(module: nn.Module, size: Size) -> Axes | None:
    """Return what has the channels of a size, each once; None where they are in groups."""
    found: dict[tuple[int, int], tuple[Tensor, int]] = {}
    for layer, arguments in _layers(module, size):
        whole: Any = layer
        depthwise = arguments >= {"in_channels", "out_channels", "groups"}
        if isinstance(layer, Conv2d) and not depthwise and layer.active("groups") != 1:
            return None
        if arguments & (_MAKES | _NORMALISES):
            held = [*whole.named_parameters(recurse=False), *whole.named_buffers(recurse=False)]
            found.update({(id(one), 0): (one, 0) for _, one in held if one.ndim})
        if arguments & _READS and not depthwise:
            found[id(whole.weight), 1] = whole.weight, 1
    return list(found.values())


def _importance(module: nn.Module, size: Size) -> Tensor:
    """Return the L1 norm of the weights that make each channel (channels,), over all layers that do."""
    norms = [layer.weight.abs().flatten(1).sum(1) for layer, arguments in _layers(module, size) if arguments & _MAKES]  # type: ignore[attr-defined]
    return torch.stack(norms).sum(0)


def _permute(axes: Axes, order: Tensor) -> None:
    for one, axis in axes:
        one.copy_(one.index_select(axis, order))


def _outputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(module(*args, **(kwargs or {}))) if isinstance(one, Tensor)]


def _close(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE * float(other.abs().max()))
        for one, other in zip(outputs, expected, strict=True)
    )
