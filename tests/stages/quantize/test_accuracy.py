"""Holding a bound on quality: that it holds, that no fewer layers would do, what happens where nothing holds; kills."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize import holding as method
from mil_cli.stages.quantize.accuracy import _Widening, alone, within_drop
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.dynamic import DynamicConfig
from mil_cli.stages.quantize.holding import BoundedConfig
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.lsq import quantize as lsq
from mil_cli.stages.quantize.post_training import prepare
from mil_cli.stages.quantize.settings import QuantizationConfig
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.stages.quantize.weight_only import WeightOnlyConfig
from mil_cli.stages.registry import METHODS, config_type, function_of
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import fit
from tests.stages.contexts import Notices, make_context, run_through_kills
from tests.stages.quantize.striped import stripes
from tests.stages.quantize.test_mixed import Net

LAYERS = ("stem.0", "wide", "back", "head")
LOW = {"weight_bits": 2, "activation_bits": 8, "first_last_bits": 2, "per_channel": True}


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(name="stripes", train=stripes(512, 0), val=stripes(512, 1), test=stripes(8, 2))


@pytest.fixture(scope="module")
def even(data: Data) -> Model:
    torch.manual_seed(0)
    net = Model.capture(Net(), (torch.randn(2, 1, 8, 8),))
    settings = TrainerConfig(epochs=10, batch_size=64, learning_rate=0.1)
    return fit(net, task=Classification(), data=data, settings=settings, seed=0).model


@pytest.fixture(scope="module")
def model(even: Model) -> Model:
    """Two of its layers have channels of very different size, which undo one another."""
    net = even.clone()
    with torch.no_grad():
        state = net.state_dict()
        factors = torch.logspace(-2.0, 2.0, 24)
        state["wide.weight"] *= factors[:, None, None, None]
        state["wide.bias"] *= factors
        state["back.weight"] /= factors[None, :, None, None]
    return net


def context(data: Data, workspace: Path | None = None, **options: Any) -> Context:
    return make_context(data, name="quantize", workspace=workspace, **options)


def config(**settings: Any) -> StaticConfig:
    return StaticConfig.model_validate({"max_drop": "2%", "per_channel": False, **settings})


def accuracy(model: Model, data: Data) -> float:
    return evaluate(model, task=Classification(), split=data.val, split_name="val").value


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 3, "activation_bits": 3, "first_last_bits": 3}])
def test_the_bound_holds_with_no_more_layers_spared_than_needed(
    settings: dict[str, Any], model: Model, data: Data, tmp_path: Path
) -> None:
    used = context(data, tmp_path)
    without = quantize(model, config(**settings, max_drop=None), context(data))
    result = quantize(model, config(**settings), used)
    whole = accuracy(model, data)
    assert accuracy(without, data) < 0.98 * whole <= accuracy(result, data)
    notes, trials = used.notes, used.slot("max_drop").load()["trials"]  # type: ignore[index]
    assert notes["drop"] == pytest.approx(1 - accuracy(result, data) / whole)
    assert notes["trials"] == len(trials)
    spared: list[str] = notes["spared"]  # type: ignore[assignment]
    assert 0 < len(spared) < len(LAYERS)
    assert len(present_bits(result).bits) == len(LAYERS) - len(spared)
    assert notes["kept_float"] == dict.fromkeys(spared, "it cost more than max_drop")
    fewer = [trial for trial in trials if len(trial["spared"]) == len(spared) - 1]
    assert fewer
    assert all(trial["quality"] < 0.98 * whole for trial in fewer)


@pytest.mark.parametrize("enough", [4, 8])
def test_more_bits_come_before_no_quantization(
    enough: int, even: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if two layers of fewer bits than are enough were what quality bears."""

    def quality(net: Model, *_: object, **__: object) -> float:
        bits = [weight for weight, _ in present_bits(net).bits.values()]
        return 0.9 - 0.1 * (sum(each < enough for each in bits) > 2)

    monkeypatch.setattr(method, "quality_or_worst", quality)
    used = context(data)
    result = quantize(even, config(**LOW), used)
    assert used.notes["spared"] == []
    widened: dict[str, int] = used.notes["widened"]  # type: ignore[assignment]
    assert sorted(widened.values()) == ([4, 4] if enough == 4 else [4, 4, 8, 8])
    found = {name: weight for name, (weight, _) in present_bits(result).bits.items()}
    assert sorted(found.values()) == ([2, 2, 4, 4] if enough == 4 else [4, 4, 8, 8])


def test_wider_layers_are_those_that_do_most_damage(even: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one layer of few bits were what quality bears."""

    def quality(net: Model, *_: object, **__: object) -> float:
        return 0.9 - 0.1 * (sum(weight < 4 for weight, _ in present_bits(net).bits.values()) > 1)

    damage = {"stem.0": 0.3, "wide": 0.1, "back": 0.4, "head": 0.2}
    monkeypatch.setattr(method, "quality_or_worst", quality)
    monkeypatch.setattr(_Widening, "_damage", lambda _, name, widened: damage[name])
    used = context(data)
    quantize(even, config(**LOW), used)
    assert used.notes["widened"] == {"back": 4, "head": 4, "stem.0": 4}


def test_on_a_target_that_packs_no_four_bits_more_bits_are_eight(even: Model, data: Data) -> None:
    device = DeviceProfile(name="old", int8=Int8Form(activations="uint8", reduce_range=False), weight_bits=(2, 8))
    used = context(data, device=device)
    quantize(even, config(**LOW), used)
    assert set(used.notes["widened"].values()) == {8}  # type: ignore[attr-defined]


def test_more_bits_hold_the_bound(even: Model, data: Data) -> None:
    used = context(data)
    result = quantize(even, config(**LOW), used)
    assert accuracy(result, data) >= 0.98 * accuracy(even, data)
    assert used.notes["spared"] == []
    assert 0 < len(used.notes["widened"]) < len(LAYERS)  # type: ignore[arg-type]
    assert {weight for weight, _ in present_bits(result).bits.values()} == {2, 4}


def test_what_holds_at_once_is_what_there_is_without_the_bound(model: Model, data: Data) -> None:
    used = context(data)
    loose = quantize(model, config(max_drop="90%"), used)
    assert loose.fingerprint() == quantize(model, config(max_drop=None), context(data)).fingerprint()
    assert used.notes["trials"] == 1
    assert {"data/val", "data/train"} <= set(used.trace.reads)


@pytest.mark.parametrize("quality", [0.87, -math.inf])
def test_where_nothing_holds_the_model_stays_float_and_that_is_told(
    quality: float, model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every quantized layer cost three points, or everything that is left."""
    monkeypatch.setattr(method, "quality_or_worst", lambda net, *_, **__: quality if present_bits(net).bits else 0.9)
    told = Notices()
    used = context(data, progress=told)
    result = quantize(model, config(max_drop="1%"), used)
    assert result.fingerprint() == model.fingerprint()
    assert used.notes["quantized_layers"] == 0
    assert used.notes["drop"] == 0
    assert used.notes["kept_float"] == dict.fromkeys(LAYERS, "it cost more than max_drop")
    assert used.notes["trials"] == 2
    lost = "3.333" if math.isfinite(quality) else "inf"
    expected = f"quantize: no quantized model holds max_drop 1 %, the best of 2 loses {lost} %: all layers stay float"
    assert told.told == [expected]


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.last = nn.Conv2d(4, 4, 3), nn.Linear(36 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(self.second(torch.relu(self.first(x)))))
        logits: Tensor = self.last(x.flatten(1))
        return logits


@pytest.mark.parametrize("name", ["first", "second", "third", "last"])
def test_a_layer_alone_is_quantized_as_if_all_others_were_skipped(name: str, data: Data) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    net = Model.capture(Chain().eval(), (x[:2],))
    low = {"weight_bits": 3, "activation_bits": 4, "first_last_bits": 4, "bias_correction": False}
    prepared = prepare(net, StaticConfig.model_validate(low), context(data))
    quantized = prepared.insert()
    others = [other for other in ("first", "second", "third", "last") if other != name]
    single = quantize(net, StaticConfig.model_validate({**low, "skip": others}), context(data))
    with torch.no_grad():  # those of quantized layers are rounded
        for other in others:
            single.graph.get_parameter(f"{other}.bias").copy_(quantized.graph.get_parameter(f"{other}.bias"))
    before = quantized(x)
    (layer,) = (layer.node for layer in prepared.placement.layers if layer.name == name)
    with alone(quantized.graph, [layer], prepared.placement):
        assert torch.equal(quantized(x), single(x))
    assert torch.equal(quantized(x), before)
    assert not torch.equal(single(x), before)


@pytest.mark.parametrize("name", sorted(name for family, name in METHODS if family == "quantize" and name != "mixed"))
def test_every_method_holds_the_bound(name: str) -> None:
    kind = config_type("quantize", name)
    assert issubclass(kind, BoundedConfig)
    run = inspect.unwrap(function_of(kind()), stop=lambda function: "search" in function.__code__.co_freevars)
    by_bits = inspect.getclosurevars(within_drop(quantize)).nonlocals["search"]
    assert (inspect.getclosurevars(run).nonlocals["search"] is by_bits) == issubclass(kind, QuantizationConfig)


TRAINED = {"batch_size": 64, "learning_rate": 0.02}


def test_a_method_that_trains_widens_no_more_layers_than_needed(
    even: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = LsqConfig(weight_bits=2, activation_bits=2, first_last_bits=2, trainer={**TRAINED, "epochs": 1})
    whole = accuracy(even, data)
    reached = accuracy(lsq(even, few, context(data)), data)
    bound = (1 - reached / whole) / 2
    assert bound > 0.001
    settings = few.model_copy(update={"max_drop": bound})
    used = context(data, tmp_path / "whole")
    result = lsq(even, settings, used)
    assert 1 - accuracy(result, data) / whole <= bound
    widened: dict[str, int] = used.notes["widened"]  # type: ignore[assignment]
    bits = max(widened.values())
    assert set(widened.values()) == {bits}
    assert 0 < len(widened) < len(LAYERS)
    assert used.notes["spared"] == []
    assert sorted(weight for weight, _ in present_bits(result).bits.values()) == [
        *[2] * (len(LAYERS) - len(widened)),
        *[bits] * len(widened),
    ]
    trials = used.slot("max_drop").load()["trials"]  # type: ignore[index]
    fewer = [trial for trial in trials if len(trial["widened"]) == len(widened) - 1]
    assert fewer
    assert all(1 - trial["quality"] / whole > bound for trial in fewer)

    def run() -> Model:
        return lsq(even, settings, context(data, tmp_path / "killed"))

    resumed = run_through_kills(run, monkeypatch, saves=(2, 9, 12))
    assert resumed.fingerprint() == result.fingerprint()


class Computed(nn.Module):
    """A layer whose weight is computed between two whose weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        logits: Tensor = self.last(torch.relu(functional.linear(x, self.gain.tanh())))
        return logits


def test_layers_that_a_method_leaves_float_are_not_ranked(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the second quantized layer cost three points: each of them is spared but one."""
    monkeypatch.setattr(
        method, "quality_or_worst", lambda net, *_, **__: 0.9 - 0.03 * max(len(present_bits(net).bits) - 1, 0)
    )
    net = Model.capture(Computed().eval(), (torch.randn(2, 1, 8, 8),))
    used = context(data)
    settings = LsqConfig(weight_bits=2, max_drop=0.01, trainer={**TRAINED, "epochs": 1})
    result = lsq(net, settings, used)
    assert len(present_bits(result).bits) == 1
    assert len(used.notes["spared"]) == 1  # type: ignore[arg-type]
    reasons = used.notes["kept_float"].values()  # type: ignore[attr-defined]
    assert sorted(reasons) == ["it cost more than max_drop", "its weight is computed in the graph"]


@pytest.fixture(scope="module")
def linear(data: Data) -> Model:
    """Two of its layers have channels of very different size, which undo one another."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    settings = TrainerConfig(epochs=10, batch_size=64, learning_rate=0.1)
    start = Model.capture(net, (torch.randn(2, 1, 8, 8),))
    result = fit(start, task=Classification(), data=data, settings=settings, seed=0).model
    with torch.no_grad():
        state, factors = result.state_dict(), torch.logspace(-1.5, 1.5, 32)
        state["1.weight"] *= factors[:, None]
        state["1.bias"] *= factors
        state["3.weight"] /= factors
    return result


FEW: list[DynamicConfig | WeightOnlyConfig] = [
    DynamicConfig(weight_bits=2, first_last_bits=2, per_channel=False),
    WeightOnlyConfig(weight_bits=2, first_last_bits=2, block_size=None, weight_observer="min_max"),
    WeightOnlyConfig(weight_bits=2, first_last_bits=2, block_size=None, weight_observer="min_max", rounding="gptq"),
]


@pytest.mark.parametrize(
    "few", [*FEW[:2], pytest.param(FEW[2], marks=pytest.mark.slow)], ids=["dynamic", "weight_only", "gptq"]
)
def test_a_method_without_bits_by_layer_leaves_no_more_layers_float_than_needed(
    few: DynamicConfig | WeightOnlyConfig, linear: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = function_of(few), accuracy(linear, data)
    reached = accuracy(run(linear, few, context(data)), data)
    bound = (1 - reached / whole) / 2
    assert bound > 0.001
    config = few.model_copy(update={"max_drop": bound})
    used = context(data)
    result = run(linear, config, used)
    assert 1 - accuracy(result, data) / whole <= bound
    spared: list[str] = used.notes["spared"]  # type: ignore[assignment]
    assert 0 < len(spared) < 3
    assert used.notes["kept_float"] == dict.fromkeys(spared, "it cost more than max_drop")
    assert len(present_bits(result).bits) == 3 - len(spared)

    resumed = run_through_kills(lambda: run(linear, config, context(data, tmp_path)), monkeypatch, saves=(2, 4))
    assert resumed.fingerprint() == result.fingerprint()


def test_a_drop_that_anything_meets_is_refused() -> None:
    with pytest.raises(ValidationError, match="a drop of 100 % or more"):
        config(max_drop="120%")
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        config(max_drop=-0.1)


def test_a_killed_run_goes_on_to_the_same_weights(
    model: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(weight_bits=3, activation_bits=3, first_last_bits=3)
    around = context(data)
    whole = quantize(model, settings, around)
    contexts: list[Context] = []

    def run() -> Model:
        contexts.append(context(data, tmp_path))
        return quantize(model, settings, contexts[-1])

    resumed = run_through_kills(run, monkeypatch, saves=(2, 5, 9))
    assert resumed.fingerprint() == whole.fingerprint()
    assert contexts[-1].notes == around.notes
