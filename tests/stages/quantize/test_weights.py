from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.digits import digits
from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import OnnxModel
from mil_cli.graph.capture import capture
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.ops.quantize import quantize_affine
from mil_cli.stages.quantize.ranges import weight_codes
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.quantize.weights import scale_for_bias, weight_scale
from tests.stages.contexts import make_context, trained_digits

CODES = weight_codes(8, reduce_range=False)


def error(weight: Tensor, scale: Tensor, axis: int | None, bits: int) -> float:
    codes = weight_codes(bits, reduce_range=False)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    rounded = quantize_affine(weight, scale, zero, axis, codes.quant_min, codes.quant_max)
    return float((rounded - weight).square().sum())


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_min_max_is_the_largest_weight_of_each_channel(axis: int) -> None:
    weight = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(weight, axis=axis, codes=CODES, observer="min_max")
    others = [dimension for dimension in range(3) if dimension != axis % 3]
    torch.testing.assert_close(scale, weight.abs().amax(others) / 127)
    whole = weight_scale(weight, axis=None, codes=CODES, observer="min_max")
    assert whole.shape == ()
    torch.testing.assert_close(whole, weight.abs().max() / 127)
    reduced = weight_scale(weight, axis=axis, codes=weight_codes(8, reduce_range=True), observer="min_max")
    torch.testing.assert_close(reduced, weight.abs().amax(others) / 64)


def test_min_max_reaches_the_lowest_code_of_few_bits() -> None:
    weight = torch.tensor([[-4.0, 1.0, 0.2], [-1.0, 4.0, 0.2], [-3.0, -1.0, -0.5]])
    scale = weight_scale(weight, axis=0, codes=weight_codes(2, reduce_range=False), observer="min_max")
    torch.testing.assert_close(scale, torch.tensor([2.0, 4.0, 1.5]))


@pytest.mark.parametrize("tails", ["light", "heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
def test_mse_is_never_worse_and_close_to_brute_force(bits: int, axis: int | None, tails: str) -> None:
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    weight = weight if tails == "light" else weight * weight.abs()
    codes = weight_codes(bits, reduce_range=False)
    scale = weight_scale(weight, axis=axis, codes=codes, observer="mse")
    full = weight_scale(weight, axis=axis, codes=codes, observer="min_max")
    found = error(weight, scale, axis, bits)
    assert found <= error(weight, full, axis, bits) * (1 + 1e-6)
    shares = torch.linspace(0.02, 1.0, 500)
    if axis is None:
        best = min(error(weight, full * share, None, bits) for share in shares)
    else:
        rows = [
            min(error(weight[row : row + 1], full[row : row + 1] * share, 0, bits) for share in shares)
            for row in range(6)
        ]
        best = sum(rows)
    assert found <= best * 1.05


def test_channels_of_zeros_get_the_scale_of_the_tensor() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    scale = weight_scale(weight, axis=0, codes=CODES, observer="min_max")
    torch.testing.assert_close(scale, torch.full((3,), 2.0 / 127))
    assert weight_scale(torch.zeros(2, 2), axis=0, codes=CODES, observer="mse").tolist() == [1.0, 1.0]


def test_scale_keeps_the_bias_in_32_bits() -> None:
    scale = torch.tensor([1e-12, 0.01])
    bias = torch.tensor([3.0, 3.0])
    raised = scale_for_bias(scale, bias, 0.02)
    assert raised[1] == scale[1]
    assert (bias / (raised * 0.02)).abs().max() < 2**31
    assert scale_for_bias(scale, None, 0.02) is scale
    assert scale_for_bias(torch.tensor(1e-12), bias, 0.02).shape == ()


@pytest.mark.parametrize(("weight_bits", "activation_bits", "factor"), [(8, 8, 1), (2, 4, 32)])
def test_the_file_agrees_with_the_graph_since_biases_are_whole_steps(
    weight_bits: int, activation_bits: int, factor: int, tmp_path: Path
) -> None:
    """Integer kernels hold a bias as int32: what lies between two steps moves one code in a thousand.

    Of few bits steps are large, and a bias would lose as much as weights: kernels see multiplied codes.
    """
    data = digits()
    config = StaticConfig(weight_bits=weight_bits, activation_bits=activation_bits, first_last_bits=2)
    float_model = fold_batch_norm(trained_digits())
    made = quantize_static(trained_digits(), config.model_copy(update={"bias_correction": False}), make_context(data))
    made.eval()
    (images, _), *_ = data.test.batches(len(data.test))
    layers = [node for node in calls(made.graph) if op_name(node) in ("conv2d", "linear")]
    for layer in layers:
        source, weight, bias = layer.args[:3]
        steps = [
            get_attribute(made.graph, str(get_argument(each, "scale").target)).double() for each in (source, weight)
        ]
        step = steps[0] * steps[1] / factor
        values = get_attribute(made.graph, str(bias.target)).detach().double()
        whole = values / step
        assert (whole - whole.round()).abs().max() < 1e-2  # float32 has 24 bits for up to 32
        before = get_attribute(float_model.graph, str(bias.target)).detach().double()
        assert ((values - before).abs() <= 0.51 * step + 1e-6 * before.abs()).all()
    file = export_onnx(made, tmp_path / "model.onnx").path
    with torch.no_grad():
        wanted = made(images)
    given = OnnxModel(file, made.spec)(images)
    assert (wanted - given).square().mean().sqrt() < 1e-3 * wanted.std()


class TwoBiases(nn.Module):
    """Layers of one weight; one bias is too large for the scale of the weight's first row."""

    def __init__(self, *, large_first: bool) -> None:
        super().__init__()
        self.large_first = large_first
        self.weight = nn.Parameter(torch.tensor([[1e-9, 2e-9], [0.5, -0.3]]))
        self.small, self.large = nn.Parameter(torch.tensor([0.3, 0.1])), nn.Parameter(torch.tensor([900.0, 0.2]))

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean((2, 3)) @ torch.ones(1, 2)
        biases = (self.large, self.small) if self.large_first else (self.small, self.large)
        first, second = (functional.linear(pooled, self.weight, bias) for bias in biases)
        return torch.cat([first, second, first - second, first, second], 1)


@pytest.mark.parametrize("large_first", [False, True])
def test_biases_of_layers_with_one_weight_are_whole_steps_of_its_last_scale(large_first: bool) -> None:
    float_model = capture(TwoBiases(large_first=large_first).eval(), (torch.zeros(1, 1, 8, 8),))
    made = quantize_static(float_model, StaticConfig(), make_context(digits())).eval()
    layers = [node for node in calls(made.graph) if op_name(node) == "linear"]
    assert len({get_argument(layer, "weight") for layer in layers}) == 1
    for layer in layers:
        source, weight, bias = layer.args[:3]
        steps = [get_attribute(made.graph, str(get_argument(each, "scale").target)) for each in (source, weight)]
        whole = get_attribute(made.graph, str(bias.target)).detach().double() / steps[0].double() / steps[1].double()
        assert whole.abs().max() < 2**31
        assert ((whole - whole.round()).abs() <= whole.abs() * 2**-23 + 1e-3).all()
