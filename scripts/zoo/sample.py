"""A model to check with inputs for it, and weights that hide nothing from a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree


@dataclass
class Sample:
    """A user's module and a call of it.

    Attributes:
        module: The module, as its library makes it.
        args: Positional inputs.
        kwargs: Named inputs.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def enliven(sample: Sample) -> None:
    """Give constant and small parameters random values that count, and batch norms the statistics of the inputs.

    A layer scale of 1e-6, a last norm of 0 or weights of 0.02 in attention would hide whatever goes wrong in their
    branch, and a default running mean of 0 an offset that a cut loses. The module is changed in place.
    """
    with torch.no_grad():
        for name, parameter in sample.module.named_parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                _enliven_parameter(name, parameter)
    norms = [layer for layer in sample.module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    momenta = [layer.momentum for layer in norms]
    sample.module.eval()
    for layer in norms:
        layer.train()
        layer.momentum = 1.0  # the statistics become those of this batch
    with torch.no_grad():
        sample.module(*sample.args, **sample.kwargs)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    sample.module.train()


def _enliven_parameter(name: str, parameter: Tensor) -> None:
    constant = bool(parameter.min() == parameter.max())
    if constant and name.endswith("bias"):
        parameter.normal_(std=0.1)
    elif constant and (parameter.ndim < 2 or parameter.max() != 0):
        parameter.uniform_(0.5, 1.5)
    elif constant:
        parameter.normal_(std=0.02)
    elif parameter.ndim > 1:
        wanted = parameter[0].numel() ** -0.5  # keeps the size of what a matrix or a window is applied to
        parameter.mul_(max(1.0, wanted / max(float(parameter.std()), 1e-6)))


def fresh(call: tuple[tuple[Any, ...], dict[str, Any]], seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return other inputs of the same form: new floating-point numbers, the others' own in another order."""
    generator = torch.Generator().manual_seed(seed)

    def renewed(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        order = torch.randperm(value.numel(), generator=generator)
        return value.reshape(-1)[order].reshape(value.shape)

    args, kwargs = pytree.tree_map_only(Tensor, renewed, call)
    return tuple(args), dict(kwargs)
