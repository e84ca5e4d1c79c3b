"""What all test networks are made of: a module from parts and a function, and the register of networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


class Net(nn.Module):
    """A network written as a constructor that returns its parts and a function of (parts, input)."""

    def __init__(self, parts: dict[str, nn.Module | nn.Parameter | Tensor], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Expected:
    """What the analysis of a network must show.

    Attributes:
        share: At least this share of the rows can be cut.
        frozen: A reason that is listed for what cannot be cut; empty if nothing need be frozen.
        line: ``file:line`` that this reason names: the one marked ``# frozen`` in the network's source; empty if no
            line is to blame.
        linear: Whether a weight of zero makes what it feeds zero, so that the eager module with zeroed weights is a
            reference; without it only masked activations are.
        counted: Whether torch's own counter of operations knows all of its operators.
    """

    share: float
    frozen: str
    line: str
    linear: bool
    counted: bool


IMAGE = (3, 8, 8)
Builder = Callable[[], nn.Module]
Register = dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]

NETWORKS: Register = {}
"""Networks that every kind of test runs on."""
TRICKS: Register = {}
"""Networks of one trick each, against the analysis alone."""
EXPECTED: dict[str, Expected] = {}


def network(
    shape: tuple[int, ...] = IMAGE,
    *,
    share: float = 0.55,
    frozen: str = "",
    linear: bool = True,
    counted: bool = True,
    register: Register = NETWORKS,
) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        assert build.__name__ not in EXPECTED
        register[build.__name__] = lambda: (build(), shape)
        line = _marked_line(build) if frozen else ""
        EXPECTED[build.__name__] = Expected(share, frozen, line, linear, counted)
        return build

    return add


trick = partial(network, register=TRICKS)


def _marked_line(build: Callable[[], nn.Module]) -> str:
    lines, first = inspect.getsourcelines(build)
    marked = [first + number for number, line in enumerate(lines) if line.rstrip().endswith("# frozen")]
    return f"{inspect.getsourcefile(build)}:{marked[0]}" if marked else ""


def conv(inputs: int, outputs: int, window: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, window, padding=window // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))
