"""Language models whose weights are read transposed are quantized as others are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.stages.quantize.weight_only import WeightOnlyConfig
from mil_cli.stages.quantize.weight_only import quantize as quantize_weights
from tests.stages.contexts import make_context
from tests.stages.test_curvature import data_of


class Language(nn.Module):
    """An embedding whose weight is the head's, and a linear layer as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.weight).reshape(x.shape)
        return torch.relu(x) @ self.words.weight.T


def test_weights_that_are_read_transposed_are_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (32, 4))
    net = Model.capture(Language().eval(), (tokens[:2],))
    used = make_context(data_of(tokens))
    model = quantize(net, StaticConfig(calibration_samples=32), used)
    assert used.notes["quantized_layers"] == 2
    with torch.no_grad():
        assert float((model(tokens) - net(tokens)).norm()) < 0.03 * float(net(tokens).norm())
    path = export_onnx(model, tmp_path / "model.onnx").path
    check_parity(model, path, [((tokens,), {})])
    assert integer_coverage(path).float_layers == ()
    alone = make_context(digits())
    quantize_weights(net, WeightOnlyConfig(), alone)
    assert alone.notes["quantized_weights"] == 2
    assert alone.notes["kept_float"] == {}
