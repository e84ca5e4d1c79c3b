"""What the report says of the kernels that a quantized file runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.export.onnx import export_onnx
from mil_cli.graph.model import Model
from mil_cli.run.kernels import kernel_notices, kernels_of
from mil_cli.stages.quantize.dynamic import DynamicConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.weight_only import WeightOnlyConfig
from mil_cli.stages.registry import StageConfig, function_of
from tests.stages.contexts import make_context


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.stem(images))))
        logits: Tensor = self.head(torch.relu(self.hidden(x.mean((2, 3)))))
        return logits


def kernels(config: StageConfig | None, path: Path) -> dict[str, Any] | None:
    torch.manual_seed(0)
    model = Model.capture(Net().eval(), (torch.randn(2, 1, 8, 8),))
    if config is not None:
        model = function_of(config)(model, config, make_context(digits()))
    return kernels_of(model, export_onnx(model, path / "model.onnx").path)


@pytest.mark.parametrize(
    ("config", "integers", "floats"),
    [
        (StaticConfig(calibration_samples=64), 4, 0),
        (StaticConfig(calibration_samples=64, skip=("middle",)), 3, 1),
        (DynamicConfig(), 2, 2),
        (WeightOnlyConfig(), 0, 4),
    ],
    ids=["static", "skip", "dynamic", "weight_only"],
)
def test_the_file_runs_as_the_graph_is_quantized(
    config: StageConfig, integers: int, floats: int, tmp_path: Path
) -> None:
    found = kernels(config, tmp_path)
    assert found is not None
    assert found["quantized_layers"] == found["integer_layers"] == integers
    assert len(found["float_layers"]) == floats
    assert found["conversions"] > 0 or not isinstance(config, StaticConfig)
    assert kernel_notices(found) == []


def test_a_float_model_has_no_kernels_of_integers(tmp_path: Path) -> None:
    assert kernels(None, tmp_path) is None
    assert kernel_notices(None) == []


def test_what_runs_otherwise_is_told() -> None:
    found = {"quantized_layers": 4, "float_layers": ["stem", "head"]}
    (fewer,) = kernel_notices({**found, "integer_layers": 3})
    assert "3 of the 4 quantized layers" in fewer
    assert "stem, head" in fewer
    (more,) = kernel_notices({**found, "integer_layers": 6})
    assert "rounds 2 layers" in more
    assert kernel_notices({**found, "integer_layers": 3, "float_layers": []}) == []  # onnxruntime joined two
