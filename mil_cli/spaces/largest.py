"""The plain net that stands for a space where one net is asked for."""

from __future__ import annotations

from torch import nn

from mil_cli.spaces.decisions import find_decisions
from mil_cli.spaces.space import DesignedSpace


def largest(module: nn.Module) -> nn.Module:
    """Return a module's largest architecture with the weights that it has; a module without choices as it is."""
    if not find_decisions(module):
        return module
    space = DesignedSpace(module)
    return space.build(space.largest, inherit=True)
