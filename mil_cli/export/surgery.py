"""What all rewriting of markers shares: new nodes, constants that are kept once, values in the place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return what a value always is, or None if it is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that makes a value, or None if something else does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def transposes_second(product: ir.Node) -> bool | None:
    """Whether a MatMul, or a Gemm that is a plain product, transposes its second operand; None if it is neither."""
    if product.domain != "" or product.op_type not in ("MatMul", "Gemm"):
        return None
    numbers = {name: value.value for name, value in product.attributes.items()}
    if numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0 or numbers.get("transA", 0):
        return None
    return bool(numbers.get("transB", 0))


def remove_unused(graph: ir.Graph) -> None:
    """Remove the initializers that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


class GraphWriter:
    """Puts standard nodes into a graph; constants that are equal are kept once.

    Args:
        graph: The graph; it is changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._inserted = 0
        made = (value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs)
        self._names = {value.name for value in (*made, *graph.inputs, *graph.initializers.values())}

    def insert(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any],
        *dtypes: ir.DataType,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node before another; returns its first output.

        Args:
            before: The node that comes next.
            op: The operator.
            inputs: Its inputs.
            attributes: Its attributes.
            dtypes: The type of each output.
            domain: The operator's domain, if it is not ONNX's own.
        """
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=len(dtypes))
        self.graph.insert_before(before, node)
        for position, (output, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            output.name = f"{op}.{self._inserted}" if position == 0 else f"{op}.{self._inserted}.{position}"
            output.dtype = dtype
        self._inserted += 1
        return node.outputs[0]

    def reshape(self, before: ir.Node, value: ir.Value, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        """Insert a Reshape of a value of type `dtype`; 0 keeps an axis, -1 is what is left."""
        target = self.constant("shape", np.array(shape), ir.DataType.INT64)
        return self.insert(before, "Reshape", [value, target], {}, dtype)

    def constant(self, name: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
        """Return an initializer of these values, the same one for the same values."""
        values = np.ascontiguousarray(array).reshape(array.shape).astype(dtype.numpy())
        key = (dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            unique, number = name, 0
            while unique in self._names:
                number += 1
                unique = f"{name}.{number}"
            self._names.add(unique)
            value = ir.val(unique, const_value=ir.Tensor(values, dtype, name=unique))
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def replace(self, old: ir.Value, new: ir.Value, node: ir.Node) -> None:
        """Let `new` take the place of `old`, the output of `node`, which is removed."""
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
