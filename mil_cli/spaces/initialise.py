"""Gives a module fresh weights."""

from __future__ import annotations

import torch
from torch import nn

from mil_cli.errors import ModelError


def initialise(module: nn.Module, *, seed: int) -> None:
    """Draw all weights of a module anew, in place: parts first, each by its own ``reset_parameters``.

    The global random state is left as it was.

    Args:
        module: The module.
        seed: All weights follow from it.

    Raises:
        ModelError: A module has parameters of its own and no ``reset_parameters``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _reset(module, "", set())


def _reset(module: nn.Module, path: str, done: set[nn.Module]) -> None:
    if module in done:
        return
    done.add(module)
    for name, child in module.named_children():
        _reset(child, f"{path}.{name}" if path else name, done)
    # MultiheadAttention and Transformer have it under the private name.
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()
    elif next(module.parameters(recurse=False), None) is not None:
        raise ModelError(
            "the module has parameters and no reset_parameters that draws them anew",
            where=path or None,
            value=type(module).__name__,
            hint="give the class a method reset_parameters(self), and call it in __init__",
        )
