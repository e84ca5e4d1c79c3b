"""Ranges found at run time: which layers, which kernels, and that the file computes what the graph does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.errors import StageError
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.coupling import analyse
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.dynamic import DynamicConfig, quantize
from mil_cli.stages.quantize.insert import QuantizerWriter
from mil_cli.stages.registry import config_type, function_of
from tests.stages.contexts import make_context


class Attention(nn.Module):
    """Three products that read one value, a product of activations, one with a parameter, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(3, 16, 2, 2)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(16, 24) * 0.2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).transpose(1, 2)
        y = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)
        return self.head(((x + y) @ self.mix).mean(1))


def inputs(count: int) -> tuple[Tensor]:
    return (torch.randn(count, 3, 12, generator=torch.Generator().manual_seed(count)),)


@pytest.fixture(scope="module")
def net() -> Model:
    torch.manual_seed(0)
    return Model.capture(Attention().eval(), inputs(2))


def quantized(model: Model, *, reduce_range: bool = True, **settings: Any) -> tuple[Model, dict[str, object]]:
    device = DeviceProfile(name="test", int8=Int8Form(activations="uint8", reduce_range=reduce_range))
    used = make_context(digits(), device=device)
    return quantize(model, DynamicConfig(**settings), used), used.notes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_bits": 3, "first_last_bits": 3},
        pytest.param({"per_channel": False}, marks=pytest.mark.slow),
    ],
)
def test_every_product_with_a_weight_runs_in_integers(settings: dict[str, Any], net: Model, tmp_path: Path) -> None:
    model, notes = quantized(net, **settings)
    path = export_onnx(model, tmp_path / "model.onnx").path
    coverage = integer_coverage(path)
    assert coverage.integer_layers == notes["quantized_layers"] == 5
    assert len(coverage.float_layers) == 1  # the convolution
    assert coverage.conversions == 0
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("DynamicQuantizeLinear") == notes["quantized_values"] == 3
    assert "Gemm" not in operators
    parity = check_parity(model, path, [(inputs(count), {}) for count in (1, 5)])
    assert parity.quantized
    assert parity.relative_rms < 1e-4
    kept: Any = notes["kept_float"]
    assert set(kept) == {"patches"}
    assert "static" in kept["patches"]


def test_close_to_the_float_model_and_closer_with_more_bits(net: Model) -> None:
    x = inputs(64)
    errors = []
    for bits in (8, 6, 4):
        model, _ = quantized(net, weight_bits=bits, first_last_bits=bits, reduce_range=False)
        with torch.no_grad():
            errors.append(float((model(*x) - net(*x)).norm() / net(*x).norm()))
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < errors[2]


def test_rules_of_the_device(net: Model) -> None:
    def largest(**settings: Any) -> set[int]:
        model, _ = quantized(net, **settings)
        nodes = [node for node in calls(model.graph) if op_name(node) == "quantize_affine"]
        return {get_argument(node, "quant_max") for node in nodes}

    assert largest(reduce_range=True) == {64}
    assert largest(reduce_range=False) == {127}
    assert largest(weight_bits=4) == {7, 64}  # the last layer keeps 8


def test_another_reader_gets_the_rounded_values(tmp_path: Path) -> None:
    model = Model.capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), (torch.randn(2, 4),))
    (tanh,) = (node for node in calls(model.graph) if op_name(node) == "tanh")
    writer = QuantizerWriter(model.graph)
    writer.insert_dynamic(tanh.args[0], [tanh])  # type: ignore[arg-type]
    writer.finish()
    path = export_onnx(model, tmp_path / "model.onnx").path
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert {"DynamicQuantizeLinear", "DequantizeLinear", "Gemm"} <= set(operators)
    check_parity(model, path, [((torch.randn(9, 4),), {})])


def test_models_without_products_are_refused_and_twice_too(net: Model) -> None:
    with pytest.raises(StageError, match="no product of the model") as caught:
        quantized(Model.capture(nn.Conv2d(1, 2, 3).eval(), (torch.randn(2, 1, 8, 8),)))
    assert "quantize/static" in str(caught.value)
    with pytest.raises(StageError, match="quantized already"):
        quantized(quantized(net)[0])


def test_registered_archived_and_analysed(net: Model, tmp_path: Path) -> None:
    assert config_type("quantize", "dynamic") is DynamicConfig
    assert function_of(DynamicConfig()) is quantize
    model, _ = quantized(net)
    model.save(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(Model.load(tmp_path / "model.pt2")(*inputs(3)), model(*inputs(3)))
    assert analyse(model).unknown == ()
    assert set(present_bits(model).bits.values()) == {(8, 8)}


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x[:, :, :4] += 5.0
        return self.second(x)


def test_a_value_that_is_overwritten_is_not_quantized_as_it_was_before() -> None:
    torch.manual_seed(0)
    model = Model.capture(Written().eval(), inputs(2))
    used = make_context(digits())
    with torch.no_grad():
        exact, found = model(*inputs(8)), quantize(model, DynamicConfig(), used)(*inputs(8))
    assert float((found - exact).norm() / exact.norm()) < 0.02
    assert used.notes["kept_float"] == {"second": "an operator in place changes its input after it was made"}
