"""What the graph has in float is float in onnxruntime too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity


class Between(nn.Module):
    """Layers of every kind between quantized ones; their weights lie so far apart that one scale loses most."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.middle = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(8, 8, 1)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        with torch.no_grad():
            for layer in (self.depthwise, self.first):
                layer.weight *= torch.logspace(-3, 1, 8).reshape(-1, *[1] * (layer.weight.ndim - 1))
            self.up.weight *= torch.logspace(-3, 1, 8).reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.depthwise(self.stem(x)))))
        x = self.last(self.up(nn.functional.max_pool2d(x, 2)))
        logits: Tensor = self.second(torch.relu(self.first(x.mean((2, 3)))))
        return logits


@pytest.mark.parametrize("activation_bits", [8, 4])
def test_layers_left_float_keep_their_weights(
    activation_bits: int, tmp_path: Path, make_case: Callable[..., Any]
) -> None:
    made = make_case(Between(), lambda count: (torch.randn(count, 3, 8, 8),), tmp_path / "float.onnx")
    model, notes = made.quantize(skip=["depthwise", "first"], activation_bits=activation_bits)
    assert set(notes["kept_float"]) == {"depthwise", "first", "up"}
    path = export_onnx(model, tmp_path / "model.onnx").path
    coverage = integer_coverage(path)
    assert coverage.integer_layers == notes["quantized_layers"] == 4
    assert len(coverage.float_layers) == 2  # transposed convolutions are among the operators
    assert "ConvTranspose" in coverage.float_operators
    parity = check_parity(model, path, [(made.inputs(32), {})])
    assert parity.noise_ratio is not None
    assert parity.noise_ratio < 0.2
