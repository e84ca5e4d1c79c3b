"""Products that a user writes himself, `x @ W + b`, run on integer kernels in onnxruntime's own optimised graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import open_session, session_options
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.contexts import make_context


class Products(nn.Module):
    """What may be added to a product of matrices: a bias before or behind it, a row, a number, an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(16, 16) / 4 for _ in range(7)])
        self.bias, self.row, self.number = (nn.Parameter(torch.randn(shape)) for shape in ((16,), (1, 16), (1,)))

    def forward(self, x: Tensor) -> Tensor:
        weights = list(self.weights)
        x = torch.tanh(x @ weights[0] + self.bias)
        x = torch.tanh(self.bias + x @ weights[1])
        x = torch.tanh(x @ weights[2] + self.row)
        x = torch.tanh(x @ weights[3] + self.number)
        x = torch.tanh(x + x @ weights[4])
        x = torch.tanh(x @ weights[5])
        return torch.relu(x @ weights[6] + self.bias)


def test_products_of_two_axes_are_integer_kernels(tmp_path: Path) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    split = TensorSplit((x, torch.zeros(64, dtype=torch.int64)))
    net = Model.capture(Products().eval(), (x[:2],))
    model = quantize(net, StaticConfig(), make_context(Data(name="noise", train=split, val=split, test=split)))
    path, optimized = export_onnx(model, tmp_path / "model.onnx").path, tmp_path / "optimized.onnx"
    options = session_options(threads=1)
    options.optimized_model_filepath = str(optimized)
    open_session(path, threads=1, options=options)
    biased = ["QuantizeLinear", "QGemm", "Tanh"]
    added = ["QuantizeLinear", "QGemm", "Add", "Tanh"]
    alone = ["QuantizeLinear", "MatMulIntegerToFloat", "Tanh"]
    last = ["QuantizeLinear", "QGemm", "Max"]
    kernels = [node.op_type for node in onnx.load(optimized).graph.node]
    assert kernels == [*3 * biased, *2 * added, *alone, *last]
    assert integer_coverage(path).float_operators == {"Add": 2, "Max": 1, "Tanh": 6}
    assert check_parity(model, path, [((x,), {})]).relative_rms < 0.01
