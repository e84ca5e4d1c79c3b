"""Bias correction: the means of all layers' outputs are those of the float model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.calibrate import observe
from mil_cli.stages.quantize.observers.channels import ChannelMean
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.contexts import make_context, run_through_kills


class Net(nn.Module):
    """One layer has a bias, one has none, two share one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.third, self.fourth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fourth.bias = self.third.bias
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.second(torch.relu(self.first(x))))
        logits: Tensor = self.head((self.third(x) + torch.relu(self.fourth(x))).mean((2, 3)))
        return logits


SAMPLES = 96
CONFIG = StaticConfig(
    weight_bits=3, activation_bits=5, first_last_bits=5, calibration_samples=SAMPLES, calibration_batch_size=32
)


@pytest.fixture(scope="module")
def captured() -> Model:
    torch.manual_seed(0)
    return Model.capture(Net().eval(), (torch.randn(2, 1, 8, 8),))


@pytest.fixture
def model(captured: Model) -> Model:
    torch.manual_seed(0)
    return captured.clone()


def context(workspace: Path | None = None) -> Context:
    x = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    split = TensorSplit((x, torch.zeros(SAMPLES, dtype=torch.int64)))
    return make_context(Data(name="noise", train=split, val=split, test=split), workspace=workspace)


def means(model: Model) -> dict[str, Tensor]:
    layers = [node for node in calls(model.graph) if op_name(node) in ("conv2d", "linear")]
    seen = {node: ChannelMean(1) for node in layers}
    observe(model, seen, CONFIG, context())
    return {node.name: statistic.mean for node, statistic in seen.items()}


def test_means_are_those_of_the_float_model(model: Model) -> None:
    before = model.fingerprint()
    expected = means(model)
    rounded = means(quantize(model, CONFIG.model_copy(update={"bias_correction": False}), context()))
    used = context()
    corrected = quantize(model, CONFIG, used)
    found = means(corrected)
    assert used.notes["corrected_biases"] == len(expected) == 5
    for name, mean in expected.items():
        off, was_off = (float((each[name] - mean).abs().max()) for each in (found, rounded))
        assert off < 0.25 * was_off  # what rounding biases to whole steps leaves
        assert was_off > 1e-4
    assert model.fingerprint() == before


def test_the_outputs_come_closer_and_the_file_is_the_graph(model: Model, tmp_path: Path) -> None:
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    errors = {}
    for wanted in (False, True):
        quantized = quantize(model, CONFIG.model_copy(update={"bias_correction": wanted}), context())
        errors[wanted] = float((quantized(x) - model(x)).detach().norm())
    assert errors[True] < 0.7 * errors[False]
    export_onnx(quantized, tmp_path / "model.onnx", device=context().device)
    assert check_parity(quantized, tmp_path / "model.onnx", [((x,), {})], threads=1).samples == 64


def test_a_shared_bias_is_corrected_for_each_layer(model: Model) -> None:
    quantized = quantize(model, CONFIG, context())
    biases = [
        get_attribute(quantized.graph, str(get_argument(node, "bias").target))
        for node in calls(quantized.graph)
        if op_name(node) in ("conv2d", "linear")
    ]
    assert len({id(bias) for bias in biases}) == 5
    assert not torch.equal(biases[2], biases[3])


def test_a_killed_run_goes_on_with_the_same_result(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = run_through_kills(lambda: quantize(model, CONFIG, context(tmp_path)), monkeypatch, saves=(1, 3))
    whole = quantize(model, CONFIG, context())
    assert resumed.fingerprint() == whole.fingerprint()
    # What is kept is of one model: another one in the same place is corrected by its own means.
    other = CONFIG.model_copy(update={"weight_bits": 5})
    assert quantize(model, other, context(tmp_path)).fingerprint() == quantize(model, other, context()).fingerprint()


def test_by_default_only_few_bits_are_corrected(model: Model) -> None:
    for bits, corrected in ((8, False), (7, True)):
        used = context()
        quantize(model, CONFIG.model_copy(update={"weight_bits": bits}), used)
        assert ("corrected_biases" in used.notes) == corrected


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain, self.head = nn.Linear(64, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x.flatten(1), self.inner.weight, self.inner.bias * self.gain)
        logits: Tensor = self.head(torch.relu(hidden))
        return logits


def test_a_bias_that_is_computed_stays() -> None:
    used = context()
    result = quantize(Model.capture(Computed().eval(), (torch.randn(2, 1, 8, 8),)), CONFIG, used)
    assert used.notes["quantized_layers"] == 2
    assert used.notes["corrected_biases"] == 1
    assert any(op_name(node) == "mul" for node in calls(result.graph))
