"""Files with signed activations load on x86."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity


class Moved(nn.Module):
    """What convolutions make is moved, in one step and in several, and then read as floats, as codes, and put out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.max_pool2d(self.first(x), 2)
        y = self.second(x)
        tokens = self.norm(y.reshape(y.shape[0], 8, -1).transpose(1, 2))
        return tokens + torch.sigmoid(x).mean((1, 2, 3)).reshape(-1, 1, 1), y.transpose(1, 2)


def test_signed_codes_that_are_moved_and_read_as_floats(tmp_path: Path, make_case: Callable[..., Any]) -> None:
    made = make_case(Moved(), lambda count: (torch.randn(count, 3, 8, 8),), tmp_path / "float.onnx")
    model, _ = made.quantize({"activations": "int8"})
    path = export_onnx(model, tmp_path / "model.onnx").path
    parity = check_parity(model, path, [(made.inputs(16), {})])  # loads it
    assert parity.noise_ratio is not None
    assert parity.noise_ratio < 0.2
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    pairs = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
    assert {kinds[node.input[2]] for node in pairs} == {onnx.TensorProto.INT8}
