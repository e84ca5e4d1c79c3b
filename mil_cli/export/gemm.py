"""Brings products of quantized matrices into the forms that onnxruntime makes integer kernels of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mil_cli.export.surgery import GraphWriter, constant_of, dequantizer_of


def finish_products(onnx: GraphWriter) -> None:
    """Rewrite sums, biases and rectifiers behind products of quantized matrices, in place.

    Args:
        onnx: Writes into a graph whose quantizers are written.
    """
    for node in list(onnx.graph):
        total = _sum_of(node)
        if total is not None:
            _join_sum(onnx, node, total)
    for node in list(onnx.graph):
        if _is_float_gemm(node):
            _quantize_bias(onnx, node)
        elif _is_float_rectifier(node):
            _replace_rectifier(onnx, node)


def _sum_of(product: ir.Node) -> ir.Node | None:
    """Return the addition that is all that reads a MatMul of two quantized matrices; None if there is none such."""
    shape = product.outputs[0].shape if product.op_type == "MatMul" and product.domain == "" else None
    if shape is None or shape.rank() != 2 or any(_scale_of(value) is None for value in product.inputs):
        return None
    user = _only_user(product)
    return user if user is not None and user.op_type == "Add" and user.domain == "" else None


def _join_sum(onnx: GraphWriter, product: ir.Node, total: ir.Node) -> None:
    """Write a MatMul and what is added to it as a Gemm, which is how the exporter writes a linear layer.

    onnxruntime joins the two to a float Gemm before it looks for integer kernels, and finds none for that. What is no
    bias is added behind a Gemm whose bias is 0: these two it leaves apart.
    """
    result = product.outputs[0]
    (added,) = (value for value in total.inputs if value is not result)
    bias, columns = constant_of(added), result.shape[1]  # type: ignore[index]
    if not isinstance(columns, int):
        return
    is_bias = bias is not None and bias.shape in ((columns,), (1, columns))
    values = bias.reshape(-1) if is_bias else np.zeros(columns)  # type: ignore[union-attr]
    name = added.name if is_bias and added is not None else "no_bias"
    operands = [*product.inputs, onnx.constant(name or "bias", values, ir.DataType.FLOAT)]
    joined = onnx.insert(total if is_bias else product, "Gemm", operands, {}, ir.DataType.FLOAT)
    if is_bias:
        onnx.replace(total.outputs[0], joined, total)
        onnx.graph.remove(product, safe=True)
    else:
        onnx.replace(result, joined, product)


def _is_float_gemm(node: ir.Node) -> bool:
    """Whether a node is a linear layer with a bias whose result nobody quantizes at once."""
    if node.op_type != "Gemm" or node.domain != "" or len(node.inputs) != 3:
        return False
    if any(node.attributes[name].value != 1.0 for name in ("alpha", "beta") if name in node.attributes):
        return False
    user = _only_user(node)
    if user is not None and user.op_type in ("Relu", "Clip"):
        user = _only_user(user)
    return user is None or user.op_type != "QuantizeLinear"


def _quantize_bias(onnx: GraphWriter, gemm: ir.Node) -> None:
    """Write the bias of a Gemm of quantized values as int32, in steps of both scales' product.

    onnxruntime quantizes a float bias itself, but for a Gemm only if its result is quantized too.
    """
    bias = gemm.inputs[2]
    scales = [_scale_of(value) for value in gemm.inputs[:2]]
    values = None if bias is None else constant_of(bias)
    if bias is None or values is None or values.ndim != 1 or scales[0] is None or scales[1] is None:
        return
    scale = (scales[0] * scales[1]).astype(np.float32)
    limits = np.iinfo(np.int32)
    codes = np.clip(np.rint(values.astype(np.float64) / scale), limits.min, limits.max)
    name = (bias.name or "bias").removesuffix(".bias")
    inputs: list[ir.Value | None] = [
        onnx.constant(f"{name}.bias.codes", codes, ir.DataType.INT32),
        onnx.constant(f"{name}.bias.scale", scale, ir.DataType.FLOAT),
    ]
    attributes = {"axis": 0} if scale.ndim else {}
    gemm.replace_input_with(2, onnx.insert(gemm, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT))


def _is_float_rectifier(node: ir.Node) -> bool:
    """Whether a node rectifies the product of quantized values and nobody quantizes the result at once."""
    product = node.inputs[0].producer() if node.op_type == "Relu" and node.inputs[0] is not None else None
    if product is None or product.op_type not in ("MatMul", "Gemm"):
        return False
    user = _only_user(node)
    return all(_scale_of(value) is not None for value in product.inputs[:2]) and (
        user is None or user.op_type != "QuantizeLinear"
    )


def _replace_rectifier(onnx: GraphWriter, relu: ir.Node) -> None:
    """Write a rectifier between an integer product and a float operator as a maximum with 0.

    onnxruntime looks through a Relu for the QuantizeLinear behind it; where there is none, it leaves the product in
    float.
    """
    zero = onnx.constant("zero", np.array(0.0), ir.DataType.FLOAT)
    largest = onnx.insert(relu, "Max", [relu.inputs[0], zero], {}, ir.DataType.FLOAT)
    onnx.replace(relu.outputs[0], largest, relu)


def _scale_of(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    """Return the scale of a value that a DequantizeLinear makes."""
    source = dequantizer_of(value)
    scale = None if source is None else constant_of(source.inputs[1])
    return None if scale is None else scale.astype(np.float32)


def _only_user(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads a node's first output; None if there are more, or none."""
    users = list(node.outputs[0].consumers())
    return users[0] if len(users) == 1 and not node.outputs[0].is_graph_output() else None
