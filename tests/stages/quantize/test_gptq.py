"""GPTQ against least squares, against all codes there are, against rounding to nearest, and through kills."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.compensate import Compensation, round_rows
from mil_cli.stages.quantize.gptq import GptqConfig, quantize
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from tests.stages.contexts import make_context, run_through_kills, trained_digits
from tests.stages.test_curvature import data_of

DEVICE = DeviceProfile(name="test", int8=Int8Form(activations="uint8", reduce_range=True))


def correlated(samples: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) + 2 * torch.eye(inputs)
    return (torch.randn(samples, inputs, generator=generator) @ mix).double()


def how(**changes: Any) -> Compensation:
    return Compensation(**{"samples": 1, "batch_size": 1, "damping": 1e-12, "act_order": False, **changes})


def rounded(x: Tensor, weight: Tensor, step: Tensor, codes: CodeRange, settings: Compensation) -> tuple[Tensor, float]:
    found = round_rows(weight[None], step[None], (x.T @ x)[None], codes, settings)
    assert found is not None
    return found[0][0], found[1]


def test_each_rounding_is_made_up_for_by_least_squares() -> None:
    """By the definition: a weight is rounded, then the free ones are the best that they can be, and so on."""
    x, weight = correlated(200, 6), torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    step = torch.full_like(weight, 0.25)
    free = weight.clone()
    for column in range(6):
        free[:, column] = (free[:, column] / 0.25).round() * 0.25
        wanted = (weight @ x.T).T - x[:, : column + 1] @ free[:, : column + 1].T
        if column < 5:
            free[:, column + 1 :] = torch.linalg.lstsq(x[:, column + 1 :], wanted).solution.T
    nearest = (weight / 0.25).round() * 0.25
    errors = [((each - weight) @ x.T).square().sum(1) for each in (free, nearest)]
    expected = torch.where((errors[0] < errors[1])[:, None], free, nearest)
    found, ratio = rounded(x, weight, step, CodeRange(-100, 100), how())
    torch.testing.assert_close(found, expected)
    assert ratio == pytest.approx(float(torch.minimum(*errors).sum() / errors[1].sum()))


@pytest.mark.parametrize("act_order", [True, False])
def test_between_the_best_codes_and_the_nearest(act_order: bool) -> None:
    codes, step = CodeRange(-2, 1), 0.5
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5))).double() * step
    for seed in range(20):
        x, weight = correlated(50, 5, seed), torch.randn(1, 5, generator=torch.Generator().manual_seed(seed)).double()
        found, ratio = rounded(x, weight, torch.full_like(weight, step), codes, how(damping=0.01, act_order=act_order))
        nearest = (weight / step).round().clamp(-2, 1) * step
        error, worst = (float((x @ (each - weight).T).square().sum()) for each in (found, nearest))
        best = float((x @ (every - weight).T).square().sum(0).min())
        assert best * (1 - 1e-9) <= error <= worst * (1 + 1e-9)
        assert ratio == pytest.approx(error / worst)
        assert torch.equal(found / step, (found / step).round())


def test_lazy_blocks_and_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 inputs are three blocks of errors passed on late; groups are rounded as if each were alone."""
    x, weight = correlated(400, 300), torch.randn(8, 300, generator=torch.Generator().manual_seed(2)).double()
    step = torch.rand(8, 300, generator=torch.Generator().manual_seed(3)).double() / 4 + 0.1
    curvature = torch.stack([x.T @ x, torch.eye(300).double()])
    codes = CodeRange(-32, 31)
    both = round_rows(torch.stack([weight, weight]), torch.stack([step, step]), curvature, codes, how())
    assert both is not None
    torch.testing.assert_close(both[0][1], (weight / step).round() * step)  # inputs that do not correlate
    monkeypatch.setattr("mil_cli.stages.quantize.compensate._BLOCK", 1000)
    alone, ratio = rounded(x, weight, step, codes, how())
    torch.testing.assert_close(both[0][0], alone)
    assert ratio < 0.5


def test_zeros_stay() -> None:
    x, weight = correlated(100, 16), torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).double()
    weight[:, ::2] = 0.0
    found, ratio = rounded(x, weight, torch.full_like(weight, 0.3), CodeRange(-8, 7), how(act_order=True))
    assert bool((found[:, ::2] == 0).all())
    assert bool((found[:, 1::2] != 0).any())
    assert ratio < 0.9


def test_damping_is_raised_and_then_given_up() -> None:
    x = torch.ones(10, 4).double()  # of rank one
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    step = torch.full_like(weight, 0.3)
    assert rounded(x, weight, step, CodeRange(-8, 7), how(damping=1e-3))[1] < 1
    spoilt = torch.full((1, 4, 4), float("nan")).double()
    assert round_rows(weight[None], step[None], spoilt, CodeRange(-8, 7), how()) is None


def context(**changes: Any) -> Context:
    return make_context(digits(), device=DEVICE, **changes)


def output_error(model: Model, net: Model) -> float:
    images = next(iter(digits().val.batches(200)))[0]
    with torch.no_grad():
        return float((model(images) - net(images)).square().mean())


@pytest.mark.slow
def test_a_network_keeps_its_outputs_better_than_by_nearest(tmp_path: Path) -> None:
    net = trained_digits()
    settings: dict[str, Any] = {"weight_bits": 3, "calibration_samples": 128}
    used = context()
    model = quantize(net, GptqConfig(**settings), used)
    nearest = quantize_static(net, StaticConfig(**settings), context())
    assert output_error(model, net) < 0.6 * output_error(nearest, net)
    ratios: Any = used.notes["error_to_nearest"]
    assert len(ratios) == used.notes["quantized_layers"]
    assert max(ratios.values()) <= 1
    assert used.notes["rounded_to_nearest"] == {}
    path = export_onnx(model, tmp_path / "model.onnx").path
    images = next(iter(digits().val.batches(64)))[0]
    corrected = quantize(net, GptqConfig(bias_correction=True, **settings), context())
    assert output_error(corrected, net) < output_error(model, net)
    check_parity(model, path, [((images,), {})])
    assert integer_coverage(path).float_layers == ()


@pytest.mark.slow
def test_killed_between_layers_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, config = trained_digits(), GptqConfig(weight_bits=4, calibration_samples=64)
    whole = quantize(net, config, context())
    resumed = run_through_kills(lambda: quantize(net, config, context(workspace=tmp_path)), monkeypatch, (1, 3))
    assert resumed.fingerprint() == whole.fingerprint()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 16) * 0.3)
        self.depthwise, self.twice = nn.Conv1d(16, 16, 3, groups=16), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise((x @ self.mix).relu().transpose(1, 2))
        return self.twice(self.twice(x).relu())


def test_products_depthwise_layers_and_shared_weights() -> None:
    torch.manual_seed(0)
    net = Model.capture(Shared().eval(), (torch.randn(2, 8, 8),))
    used = make_context(data_of(correlated(8 * 64, 8).float().reshape(64, 8, 8).cumsum(1)), device=DEVICE)
    model = quantize(net, GptqConfig(weight_bits=4, first_last_bits=4, calibration_samples=64), used)
    assert set(used.notes["rounded_to_nearest"]) == {"twice"}  # type: ignore[call-overload]
    ratios: Any = used.notes["error_to_nearest"]
    assert set(ratios) == {"mix", "depthwise"}
    assert all(0 < ratio < 1 for ratio in ratios.values())
    quantizers = model.graph.get_submodule("quantizers")
    codes = dict(model.named_parameters())["mix"] / quantizers.get_submodule("mix_weight").scale
    torch.testing.assert_close(codes, codes.round().clamp(-8, 7), atol=1e-4, rtol=0)
