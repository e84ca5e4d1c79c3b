"""One operator as a runtime runs it: what it is, on which sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]
BLOCK = 4
"""What a number of channels must be a multiple of for onnxruntime to lay them out in blocks."""

Value = bool | int | str | tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """What decides how long one operator takes.

    Sizes are reduced to those that matter, so that operators that take the same time are one: an activation function
    has its number of elements, a linear layer its rows.

    Attributes:
        kind: What it is, such as ``conv`` or ``linear``; `mil_cli.measure.operators.models` knows how each is built.
        shapes: Shapes of its inputs, weights among them.
        elements: Numbers in its output.
        attributes: What else matters, by name, in alphabetical order.
    """

    kind: str
    shapes: tuple[Shape, ...]
    elements: int
    attributes: tuple[tuple[str, Value], ...] = ()

    @cached_property
    def key(self) -> str:
        """The operator as text: JSON, the same in every process."""
        return json.dumps([self.kind, self.shapes, self.elements, dict(self.attributes)], separators=(",", ":"))

    def __getitem__(self, name: str) -> Value:
        return dict(self.attributes)[name]

    @property
    def int8(self) -> bool:
        """Whether it runs on 8-bit integers."""
        return ("int8", True) in self.attributes

    def ints(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a list of integers.

        Raises:
            TypeError: It is something else.
        """
        value = self[name]
        if not isinstance(value, tuple):
            raise TypeError(f"{name} is no list of integers")
        return value


def make(kind: str, shapes: tuple[Shape, ...], elements: int, **attributes: Value) -> Operator:
    """Return an operator."""
    return Operator(kind, shapes, elements, tuple(sorted(attributes.items())))


def in_int8(operator: Operator) -> Operator:
    """Return the same operator on 8-bit integers."""
    return make(operator.kind, operator.shapes, operator.elements, **dict(operator.attributes), int8=True)


def unary(elements: int, function: str) -> Operator:
    """Return an element-wise function of one tensor, by its name in ONNX."""
    return make("unary", ((elements,),), elements, function=function)


def conversion(elements: int) -> Operator:
    """Return the quantization of so many float activations, and what takes them back to floats."""
    return make("conversion", ((elements,),), elements)


def approximation(elements: int) -> Operator:
    """Return what stands for an operator that is not known in detail: one pass over as many elements as it gives."""
    return unary(elements, "Relu")


def keeps_blocks(data: Shape, weight: Shape, groups: int) -> bool:
    """Whether onnxruntime runs a 2-d convolution on blocks of channels, the layout in which additions fuse with it.

    Its layout transformer asks that channels are multiples of 4 (of 8 in groups), but for the few of a first layer
    (onnxruntime, `NchwcTransformerImpl::TransformConv`).

    Args:
        data: Shape of the input, (1, channels, height, width).
        weight: Shape of the weight, (channels, channels per group, height, width).
        groups: Groups of channels.
    """
    if len(data) != 4:
        return False
    if groups > 1:
        return weight[0] % 8 == 0 and (weight[1] % 8 == 0 or (weight[1] == 1 and weight[0] == groups))
    return weight[0] % BLOCK == 0 and (weight[1] < 8 or weight[1] % BLOCK == 0)
