"""Dynamic fake quantization against ONNX's DynamicQuantizeLinear as onnxruntime computes it."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mil_cli.ops.dynamic import quantize_dynamic


def by_onnxruntime(x: Tensor) -> Tensor:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "dynamic", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


@pytest.mark.parametrize(
    "values", [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)], ids=["mixed", "above", "below", "zeros"]
)
def test_values_are_those_of_onnxruntime(values: tuple[float, float]) -> None:
    low, high = values
    x = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    found, expected = quantize_dynamic(x), by_onnxruntime(x)
    torch.testing.assert_close(found, expected)
    assert found.unique().numel() <= 256


def test_gradient_passes_and_operator_is_well_formed() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(3, 4)
    (grad,) = torch.autograd.grad(quantize_dynamic(x), x, upstream)
    assert torch.equal(grad, upstream)
    torch.library.opcheck(torch.ops.mil.quantize_dynamic.default, (x,))
    assert quantize_dynamic(torch.empty(0, 4)).shape == (0, 4)
