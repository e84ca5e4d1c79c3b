"""Small ONNX models that hold one operator, once or several times, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mil_cli.device.profile import Int8Form
from mil_cli.measure.operators.operator import Operator, Shape, keeps_blocks

OPSET = 21
IR_VERSION = 10

_SILU = "Silu"


class _Graph:
    """An ONNX graph that grows; names are given in order, so that equal operators give equal bytes."""

    def __init__(self, form: Int8Form) -> None:
        self.form = form
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._count = 0
        self._shared: dict[tuple[int | str, ...], str] = {}

    def _name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def call(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node of one output and return its name."""
        output = self._name("value")
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def activation(self, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> str:
        """Add an input of the graph."""
        name = self._name("input")
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def shared(self, shape: Sequence[int | str]) -> str:
        """Return the one input of a shape that all copies of the operator read."""
        if tuple(shape) not in self._shared:
            self._shared[tuple(shape)] = self.activation(shape)
        return self._shared[tuple(shape)]

    def shared_integers(self, shape: Shape) -> str:
        """Return the one input of a shape, as quantized activations, that all copies of the operator read."""
        if shape not in self._shared:
            self._shared[shape] = self.integers(shape)
        return self._shared[shape]

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """Add a constant that is in the file."""
        name = self._name("constant")
        self.constants.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def quantized(self, value: str) -> str:
        """Quantize activations and return what is read of them: the integers taken back to numbers."""
        return self.read(self.call("QuantizeLinear", [value, *self._scale()]))

    def read(self, integers: str) -> str:
        """Return the numbers that quantized activations stand for."""
        return self.call("DequantizeLinear", [integers, *self._scale()])

    def integers(self, shape: Shape) -> str:
        """Add an input of quantized activations and return the numbers that they stand for."""
        kind = TensorProto.UINT8 if self.form.activations == "uint8" else TensorProto.INT8
        return self.read(self.activation(shape, kind))

    def _scale(self) -> list[str]:
        dtype = np.uint8 if self.form.activations == "uint8" else np.int8
        return [self.constant(0.02, np.float32), self.constant(0, dtype)]

    def int8_weight(self, shape: Shape, axis: int) -> str:
        """Add a quantized weight, as the profile's int8 form has it, and return the numbers that it stands for.

        Args:
            shape: Its shape.
            axis: The axis of output channels.
        """
        channels = shape[axis : axis + 1] if self.form.per_channel else ()
        codes = self._filled(shape, TensorProto.INT8, 1 + self._count % 100)
        scale, zero = self._filled(channels, TensorProto.FLOAT, 0.01), self._filled(channels, TensorProto.INT8, 0)
        return self.call("DequantizeLinear", [codes, scale, zero], axis=axis)

    def int32_bias(self, width: int) -> str:
        """Add a quantized bias and return the numbers that it stands for."""
        channels = (width,) if self.form.per_channel else ()
        codes = self._filled((width,), TensorProto.INT32, 1 + self._count)
        zero = self._filled(channels, TensorProto.INT32, 0)
        return self.call("DequantizeLinear", [codes, self._filled(channels, TensorProto.FLOAT, 2e-4), zero], axis=0)

    def weight(self, shape: Shape) -> str:
        """Add a weight, which the runtime fills and packs as it loads the file: the file stays small.

        Each has its own value, or the runtime would find copies to be the same and keep one.
        """
        return self._filled(shape, TensorProto.FLOAT, 0.01 + 0.001 * self._count)

    def _filled(self, shape: Shape, kind: int, number: float) -> str:
        value = helper.make_tensor("value", kind, [1], [number])
        return self.call("ConstantOfShape", [self.constant(shape)], value=value)


def build(operator: Operator, copies: int, *, form: Int8Form, most: int | None = None) -> onnx.ModelProto:
    """Return a model that runs an operator so many times, side by side.

    Float convolutions that keep blocks of channels are added up, which costs nothing, so that values change their
    layout at the ends of the model only, however many copies there are. So are int8 convolutions, but there additions
    cost: every model has as many as the one with most copies. The results of the others are outputs.

    Args:
        operator: The operator.
        copies: How many times it runs.
        form: The form of int8 operators.
        most: Copies in the largest model that this one is compared with.
    """
    graph = _Graph(form)
    results = [_BUILDERS[operator.kind](graph, operator) for _ in range(copies)]
    if operator.kind == "conv" and operator.int8:
        total = results[0]
        for position in range(1, most or copies):
            total = graph.quantized(graph.call("Add", [total, results[min(position, copies - 1)]]))
        results = [total]
    elif operator.kind == "conv" and keeps_blocks(operator.shapes[0], operator.shapes[1], _int(operator, "groups")):
        total = results[0]
        for result in results[1:]:
            total = graph.call("Add", [total, result])
        results = [total]
    return _model(graph, results)


def empty(form: Int8Form) -> onnx.ModelProto:
    """Return the smallest model: what it takes is what every run of a session takes."""
    graph = _Graph(form)
    return _model(graph, [graph.call("Identity", [graph.activation((1,))])])


def _model(graph: _Graph, results: Sequence[str]) -> onnx.ModelProto:
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    proto = helper.make_graph(graph.nodes, "operator", graph.inputs, outputs, graph.constants)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _int(operator: Operator, name: str) -> int:
    value = operator[name]
    if not isinstance(value, int):
        raise TypeError(f"{name} is no integer")
    return value


def _conv(graph: _Graph, operator: Operator) -> str:
    data, weight = operator.shapes
    attributes: dict[str, Any] = {
        "strides": operator.ints("stride"),
        "pads": operator.ints("padding"),
        "dilations": operator.ints("dilation"),
        "group": operator["groups"],
    }
    if operator.kind == "conv_transpose":
        attributes["output_padding"] = operator.ints("output_padding")
        return graph.call("ConvTranspose", [graph.shared(data), graph.weight(weight)], **attributes)
    if operator.int8:
        inputs = [graph.shared_integers(data), graph.int8_weight(weight, 0)]
        return graph.quantized(graph.call("Conv", inputs, **attributes))
    return graph.call("Conv", [graph.shared(data), graph.weight(weight)], **attributes)


def _linear(graph: _Graph, operator: Operator) -> str:
    data, (width, depth) = operator.shapes
    bias = [graph.weight((width,))] if operator["bias"] else []
    # Without an axis of unknown size, the runtime would make one Gemm of a product and an addition.
    shape: tuple[int | str, ...] = data if operator["gemm"] else ("batch", *data)
    # In int8 models what lies between linear layers stays float: each quantizes what it reads.
    values = graph.quantized(graph.activation(shape)) if operator.int8 else graph.shared(shape)
    if operator["gemm"]:
        weight = graph.int8_weight((width, depth), 0) if operator.int8 else graph.weight((width, depth))
        if bias and operator.int8:
            bias = [graph.int32_bias(width)]
        return graph.call("Gemm", [values, weight, *bias], transB=1)
    weight = graph.int8_weight((depth, width), 1) if operator.int8 else graph.weight((depth, width))
    product = graph.call("MatMul", [values, weight])
    return graph.call("Add", [product, *bias]) if bias else product


def _matmul(graph: _Graph, operator: Operator) -> str:
    left, right = operator.shapes
    sides = [
        graph.weight(shape) if operator["constant"] == side else graph.activation(shape)
        for side, shape in (("left", left), ("right", right))
    ]
    return graph.call("MatMul", sides)


def _attention(graph: _Graph, operator: Operator) -> str:
    """Write attention as PyTorch's exporter does, which transposes the keys by way of their shape."""
    query, key, value = operator.shapes
    # An axis of unknown size, or the runtime would work the shapes out as it loads the file.
    first: int | str = "batch" if query[0] == 1 else query[0]
    keys = graph.activation((first, *key[1:]))
    zero, rows, columns, last = (graph.constant([number]) for number in (0, -2, -1, 2**31))
    shape = graph.call("Shape", [keys])
    batch = graph.call("Slice", [shape, zero, rows])
    depth = graph.call("Slice", [shape, columns, last])
    length = graph.call("Slice", [shape, rows, columns])
    flat = graph.call("Concat", [graph.constant([-1]), length, depth], axis=0)
    turned = graph.call("Transpose", [graph.call("Reshape", [keys, flat])], perm=[0, 2, 1])
    whole = graph.call("Concat", [batch, depth, length], axis=0)
    scale = graph.constant([0.5], np.float32)
    queries = graph.call("Mul", [graph.activation((first, *query[1:])), scale])
    scores = graph.call("MatMul", [queries, graph.call("Mul", [graph.call("Reshape", [turned, whole]), scale])])
    if operator["masked"]:
        scores = graph.call("Add", [scores, graph.activation((query[-2], key[-2]))])
    weights = graph.call("Softmax", [scores], axis=-1)
    return graph.call("MatMul", [weights, graph.activation((first, *value[1:]))])


def _batch_norm(graph: _Graph, operator: Operator) -> str:
    (shape,) = operator.shapes
    channels = shape[1:2]
    return graph.call("BatchNormalization", [graph.activation(shape), *(graph.weight(channels) for _ in range(4))])


def _layer_norm(graph: _Graph, operator: Operator) -> str:
    (shape,) = operator.shapes
    inputs = [graph.activation(shape), graph.weight(shape[1:]), graph.weight(shape[1:])]
    return graph.call("LayerNormalization", inputs, axis=-1)


def _softmax(graph: _Graph, operator: Operator) -> str:
    return graph.call("Softmax", [graph.activation(operator.shapes[0])], axis=-1)


def _unary(graph: _Graph, operator: Operator) -> str:
    data = graph.activation(operator.shapes[0])
    function = str(operator["function"])
    if function == _SILU:
        return graph.call("Mul", [data, graph.call("Sigmoid", [data])])
    if function == "Clip":
        return graph.call("Clip", [data, graph.constant(0, np.float32), graph.constant(6, np.float32)])
    return graph.call(function, [data])


def _conversion(graph: _Graph, operator: Operator) -> str:
    return graph.quantized(graph.activation(operator.shapes[0]))


def _binary(graph: _Graph, operator: Operator) -> str:
    if operator.int8:
        return graph.quantized(graph.call("Add", [graph.integers(shape) for shape in operator.shapes]))
    sides = [graph.activation(shape) if shape else graph.constant(1.5, np.float32) for shape in operator.shapes]
    return graph.call(str(operator["function"]), sides)


def _pool(graph: _Graph, operator: Operator) -> str:
    return graph.call(
        str(operator["function"]),
        [graph.activation(operator.shapes[0])],
        kernel_shape=operator.ints("kernel"),
        strides=operator.ints("stride"),
        pads=operator.ints("padding"),
        ceil_mode=int(bool(operator["ceil"])),
    )


def _reduce(graph: _Graph, operator: Operator) -> str:
    inputs = [graph.activation(operator.shapes[0]), graph.constant(operator.ints("axes"))]
    return graph.call(str(operator["function"]), inputs, keepdims=0)


def _transpose(graph: _Graph, operator: Operator) -> str:
    return graph.call("Transpose", [graph.activation(operator.shapes[0])], perm=operator.ints("order"))


def _gather(graph: _Graph, operator: Operator) -> str:
    table, count = operator.shapes
    return graph.call("Gather", [graph.weight(table), graph.activation(count, TensorProto.INT64)])


def _view(graph: _Graph, operator: Operator) -> str:
    return graph.call("Reshape", [graph.activation((2, 2)), graph.constant([4])])


_BUILDERS: Mapping[str, Callable[[_Graph, Operator], str]] = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "unary": _unary,
    "conversion": _conversion,
    "binary": _binary,
    "pool": _pool,
    "reduce": _reduce,
    "transpose": _transpose,
    "gather": _gather,
    "view": _view,
}
