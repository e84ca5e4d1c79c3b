"""The memory of architectures of a designed space, estimated from sizes alone, as pruning estimates that of a cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mil_cli.graph.coupling import Counter, MemoryEstimate, Sketcher
from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.spaces.cost import running_on_shapes, shapes_of


class ArchitectureMemory:
    """Estimates the bytes that a runtime needs for one sample, by architecture.

    The bytes are those of `MemoryEstimate` on the captured architecture: its weights, the constants beside them, and
    the largest set of activations that are live at once, in float. Nothing is captured for it: each architecture is
    built and run on shapes, so that its `forward` may not depend on values.

    Args:
        space: The space.
        args: Positional inputs of the module: one sample.
        kwargs: Named inputs.
    """

    def __init__(self, space: DesignedSpace, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        self._shapes = DesignedSpace(_on_meta(space.module))
        self._call = shapes_of(args, kwargs)
        self._sketcher = Sketcher()

    def __call__(self, architecture: Architecture) -> int:
        """Return the estimated bytes of an architecture.

        Raises:
            ModelError: The module does not run on the sample, or its `forward` depends on values.
        """
        built = self._shapes.build(architecture, inherit=True).eval()
        with running_on_shapes(architecture):
            coupling = self._sketcher.sketch(built, *self._call)
        return MemoryEstimate(Counter(coupling))({})


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a copy whose floating-point tensors are shapes alone; what is tied stays tied, and tables keep values."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta") if buffer.is_floating_point() else buffer
    return copy.deepcopy(module, memo)
