"""SmoothQuant: activations lose their outliers to the weights, the outputs stay."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.rescale import find_links, read_range
from mil_cli.stages.quantize.smoothing import smooth
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.contexts import Notices, make_context


class Block(nn.Module):
    """A perceptron after a norm, one channel of which is fifty times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.out = nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.weight[3] = 50.0
            self.up.weight[:, 3] *= 0.02
            self.gate.weight[:, 3] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        logits: Tensor = self.out(torch.tanh(self.down(torch.sigmoid(self.gate(y)) * self.up(y))))
        return logits


class AfterTheSum(nn.Module):
    """A transformer's perceptron with the norm behind the sum: sums read what norms make, beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        with torch.no_grad():
            for norm, reader in ((self.first, self.up), (self.second, self.out)):
                norm.weight[3] = 50.0
                reader.weight[:, 3] *= 0.02
            self.second.bias[5] = 3.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y + self.down(nn.functional.gelu(self.up(y))))
        logits: Tensor = self.out(z) + z.mean(-1, keepdim=True)
        return logits


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model.capture(Block().eval(), (torch.randn(2, 5, 16),))


def inputs() -> Tensor:
    return torch.randn(128, 5, 16, generator=torch.Generator().manual_seed(1))


def context(x: Tensor) -> Context:
    split = TensorSplit((x, torch.zeros(len(x), dtype=torch.int64)))
    return make_context(Data(name="noise", train=split, val=split, test=split))


CONFIG = StaticConfig(calibration_samples=128)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_outputs_stay_and_what_was_smoothed_is_told(model: Model, strength: float) -> None:
    x, used = inputs(), context(inputs())
    expected = model(x)
    smooth(model, strength, CONFIG, used)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert used.notes["smoothed_layers"] == 3
    assert used.notes["not_smoothed"] == ["out"]


def test_full_strength_gives_all_channels_one_range_and_none_all_weights(model: Model) -> None:
    x = inputs()
    smooth(model, 1.0, CONFIG, context(x))
    normed = nn.functional.layer_norm(
        x, (16,), *(model.graph.get_parameter(f"norm.{name}") for name in ("weight", "bias"))
    )
    torch.testing.assert_close(normed.abs().amax((0, 1)), torch.ones(16), rtol=1e-4, atol=1e-4)
    smooth(model, 0.0, CONFIG, context(x))
    (down,) = next(link.readers for link in find_links(model.graph) if op_name(link.value) == "mul")
    torch.testing.assert_close(read_range(model.graph, down), torch.ones(32, dtype=torch.float64))


def test_an_outlier_costs_less(model: Model) -> None:
    x = inputs()
    errors = []
    for strength in (None, 0.5):
        quantized = quantize(model, CONFIG.model_copy(update={"smooth": strength, "observer": "min_max"}), context(x))
        errors.append(float((quantized(x) - model(x)).detach().norm()))
    assert errors[1] < 0.7 * errors[0]


def test_values_of_norms_are_restored_for_who_else_reads_them() -> None:
    torch.manual_seed(0)
    model = Model.capture(AfterTheSum().eval(), (torch.randn(2, 5, 16),))
    x, used = inputs(), context(inputs())
    expected = model(x)
    smoothed = model.clone()
    for _ in range(2):  # what restores a value is one more of its readers
        smooth(smoothed, 1.0, CONFIG, used)
        assert used.notes["smoothed_layers"] == 2
        assert used.notes["not_smoothed"] == ["down"]
        torch.testing.assert_close(smoothed(x), expected, rtol=1e-5, atol=1e-5)
    errors = []
    for strength in (None, 0.5):
        settings = {"smooth": strength, "observer": "min_max", "skip": ["down"]}
        quantized = quantize(model, CONFIG.model_copy(update=settings), context(x))
        errors.append(float((quantized(x) - expected).detach().norm()))
    assert errors[1] < 0.7 * errors[0]


def test_nothing_is_restored_for_layers_that_stay_float() -> None:
    model = Model.capture(AfterTheSum().eval(), (torch.randn(2, 5, 16),))
    used, products = context(inputs()), Counter[tuple[str, ...]]()
    for skip in ((), ("up",), ("up", "out")):
        smoothed = model.clone()
        smooth(smoothed, 0.5, CONFIG.model_copy(update={"skip": skip}), used)
        products[skip] = sum(op_name(node) == "mul" for node in calls(smoothed.graph))
    assert products == {(): 2, ("up",): 1, ("up", "out"): 0}


class Overwritten(nn.Module):
    """Something writes into a view of what a norm gives, before a layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y[:, 0] = 0.5
        logits: Tensor = self.out(y)
        return logits


def test_what_is_written_into_later_is_left_alone() -> None:
    model = Model.capture(Overwritten().eval(), (torch.randn(2, 5, 16),))
    x = inputs()
    make_functional(model.graph)
    expected = model(x)
    smooth(model, 0.5, CONFIG, context(x))
    torch.testing.assert_close(model(x), expected)


def test_a_user_is_told_that_nothing_could_be_smoothed() -> None:
    model = Model.capture(nn.Sequential(nn.Tanh(), nn.Linear(16, 4)).eval(), (torch.randn(2, 5, 16),))
    used = context(inputs())
    used.progress = notices = Notices()
    smooth(model, 0.5, CONFIG, used)
    (told,) = notices.told
    assert "smooth moves nothing" in told


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_channels_of_next_to_nothing_are_moved_by_a_bounded_factor(model: Model, strength: float) -> None:
    with torch.no_grad():
        model.graph.get_parameter("norm.weight")[5] = 1e-25
        for layer in ("up", "gate"):
            model.graph.get_parameter(f"{layer}.weight")[:, 7] = 1e-25
    x, names = inputs(), ("norm.weight", "up.weight")
    before = {name: model.graph.get_parameter(name).detach().clone() for name in names}
    expected = model(x)
    smooth(model, strength, CONFIG, context(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for name, values in before.items():
        rise = (model.graph.get_parameter(name).detach() / values).abs()
        assert float(rise.min()) > 0
        assert float(rise.max()) < 1.01e5


def test_bad_values_are_refused(model: Model) -> None:
    with torch.no_grad():
        model.graph.get_parameter("norm.bias")[2] = float("inf")
    before = model.fingerprint()
    with pytest.raises(StageError, match="bad value at"):
        smooth(model, 0.5, CONFIG, context(inputs()))
    assert model.fingerprint() == before
