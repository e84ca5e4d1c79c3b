"""Bits by layer: costs against rounding by hand, choices against brute force, bounds, uniform bits, kills."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.errors import StageError
from mil_cli.export.onnx import export_onnx
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.measure.size import size_bytes
from mil_cli.stages.context import Context
from mil_cli.stages.quantize import allocation
from mil_cli.stages.quantize import mixed as method
from mil_cli.stages.quantize.apot import ApotConfig
from mil_cli.stages.quantize.calibrate import observe
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.mixed import MixedConfig, mixed
from mil_cli.stages.quantize.observers.channels import ChannelMean
from mil_cli.stages.quantize.post_training import prepare
from mil_cli.stages.quantize.sensitivity import Rounding, weights_of
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import fit
from tests.stages.contexts import Notices, make_context, run_through_kills
from tests.stages.quantize.striped import stripes

FREE = StaticConfig(first_last_bits=2)
"""First and last layers may have as few bits as the others."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.wide = nn.Conv2d(8, 24, 3, padding=1)
        self.back = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.back(torch.relu(self.wide(torch.relu(self.stem(x))))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(name="stripes", train=stripes(512, 0), val=stripes(256, 1), test=stripes(8, 2))


@pytest.fixture(scope="module")
def model(data: Data) -> Model:
    torch.manual_seed(0)
    net = Model.capture(Net(), (torch.randn(2, 1, 8, 8),))
    settings = TrainerConfig(epochs=12, batch_size=64, learning_rate=0.1)
    return fit(net, task=Classification(), data=data, settings=settings, seed=0).model


def context(data: Data, workspace: Path | None = None, **stages: Any) -> Context:
    stages = {"free": FREE, **stages}
    trainer = TrainerConfig(epochs=1, batch_size=64, learning_rate=0.02)
    return make_context(data, name="quantize", workspace=workspace, stages=stages, trainer=trainer)


def config(**settings: Any) -> MixedConfig:
    return MixedConfig.model_validate({"by": "free", **settings})


def outputs(model: Model, data: Data) -> Tensor:
    (batch,) = data.val.batches(256)
    with torch.no_grad():
        return model(batch[0])  # type: ignore[index,no-any-return]


def loss(model: Model, data: Data) -> float:
    (batch,) = data.val.batches(256)
    return float(nn.functional.cross_entropy(outputs(model, data), batch[1]))  # type: ignore[index]


def chosen(used: Context) -> dict[str, int]:
    return {entry["name"]: entry["weight_bits"] for entry in used.notes["layers"]}  # type: ignore[attr-defined]


def numbers(model: Model) -> dict[str, int]:
    return {name.removesuffix(".weight"): one.numel() for name, one in model.named_parameters() if one.ndim > 1}


@pytest.mark.parametrize(("sensitivity", "bound"), [("outputs", 2.6), ("loss", 4.0), ("hessian", 4.0)])
def test_no_other_choice_costs_less_within_the_bound(
    sensitivity: str, bound: float, model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation.Search, "_cost_together", lambda *args: 0.0)  # the single costs alone decide
    used = context(data)
    result = mixed(model, config(average_bits=bound, sensitivity=sensitivity, probes=2, samples=128), used)
    costs: list[dict[str, Any]] = used.notes["sensitivities"]  # type: ignore[assignment]
    counts = numbers(model)

    def total(bits: dict[str, int]) -> float:
        return sum(entry["added_cost"][entry["bits"].index(bits[entry["name"]])] for entry in costs)

    def mean(bits: dict[str, int]) -> float:
        return sum(bits[name] * count for name, count in counts.items()) / sum(counts.values())

    every = [dict(zip(counts, one, strict=True)) for one in itertools.product((2, 4, 8), repeat=4)]
    assert mean(chosen(used)) <= bound
    assert total(chosen(used)) == pytest.approx(min(total(one) for one in every if mean(one) <= bound))
    assert sorted(bits for bits, _ in present_bits(result).bits.values()) == sorted(chosen(used).values())
    assert used.notes["average_bits"] == pytest.approx(mean(chosen(used)))
    assert json.loads(json.dumps(used.notes))["summed_cost"] == pytest.approx(total(chosen(used)))


@pytest.mark.parametrize("sensitivity", ["outputs", "loss"])
def test_a_cost_is_what_one_rounded_weight_does(sensitivity: str, model: Model, data: Data) -> None:
    used = context(data, plain=FREE.model_copy(update={"bias_correction": False}))
    mixed(model, config(by="plain", average_bits=4, sensitivity=sensitivity), used)
    base, exact = loss(model, data), outputs(model, data)
    quantized = quantize_static(model, StaticConfig(weight_bits=2, first_last_bits=2), context(data))
    for entry in used.notes["sensitivities"]:  # type: ignore[attr-defined]
        net = fold_batch_norm(model)
        weight = f"{entry['name']}.weight"
        node = next(node for node in calls(quantized.graph) if str(_source(node)) == weight)
        scale = get_attribute(quantized.graph, str(get_argument(node, "scale").target))
        tensor = get_attribute(net.graph, weight).data
        step = scale.view(-1, *(1,) * (tensor.ndim - 1)) if scale.ndim else scale
        tensor.copy_((tensor / step).round().clamp(-2, 1) * step)
        given = outputs(net, data).log_softmax(1)
        divergence = nn.functional.kl_div(given, exact.log_softmax(1), log_target=True, reduction="batchmean")
        *wider, narrowest = entry["added_cost"]
        wanted = float(divergence) if sensitivity == "outputs" else loss(net, data) - base
        assert narrowest == pytest.approx(max(wanted, *wider), abs=1e-5)
        assert narrowest > 1e-4


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1, groups=2), nn.Linear(8, 6)], ids=["conv", "linear"])
def test_a_corrected_bias_keeps_the_means_of_a_rounded_layer(
    layer: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers read what a rectifier gives, whose mean is far from 0; a window of one has no border."""
    first = nn.Conv2d(1, 4, 3) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 8)
    last = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    net = Model.capture(nn.Sequential(first, nn.ReLU(), layer, nn.ReLU(), last), (torch.randn(2, 1, 8, 8),)).eval()
    used = context(data)
    settings = StaticConfig(weight_bits=2, first_last_bits=2, calibration_samples=len(data.train))
    prepared = prepare(net, settings, used)
    inner = [op_name(node) for node in calls(prepared.model.graph)].index("relu") + 1
    weight = weights_of(prepared, lambda layer: (2,))[1]
    rounding = Rounding(prepared, settings, used, 64)
    seen: list[Tensor] = []

    def look() -> Tensor:
        node = list(calls(prepared.model.graph))[inner]
        found = ChannelMean(1 if op_name(node) == "conv2d" else -1)
        observe(prepared.model, {node: found}, settings, used)
        return found.mean

    def cost(*_: Any, **__: Any) -> Tensor:
        seen.append(look())
        return torch.zeros(())

    before = look()
    monkeypatch.setattr(Classification, "distance", cost)
    rounding.distance([(weight, weight.codes[0])])
    torch.testing.assert_close(seen[0], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(look(), before)
    plain = Rounding(replace(prepared, correction=None), settings, used, 64)
    plain.distance([(weight, weight.codes[0])])
    assert (seen[-1] - before).abs().max() > 1e-2


def _source(node: Any) -> object:
    return get_argument(node, "x").target if op_name(node) == "quantize_affine" else None


def test_it_loses_less_than_one_width_for_all(model: Model, data: Data) -> None:
    used = context(data)
    result = mixed(model, config(average_bits=3, bits=[2, 3, 4, 5, 6, 8]), used)
    uniform = quantize_static(model, StaticConfig(weight_bits=3, first_last_bits=3), context(data))
    exact = outputs(model, data)
    assert used.notes["average_bits"] <= 3  # type: ignore[operator]
    assert (outputs(result, data) - exact).norm() < 0.9 * (outputs(uniform, data) - exact).norm()
    assert loss(result, data) < loss(uniform, data)


def test_weights_exchange_bits_where_single_costs_mislead(
    model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single costs say nothing, one width for all is better than what they choose, and the best is found from there."""
    prices = np.array([[0.0, 5.0, 9.0], [0.0, 1.0, 40.0], [0.0, 0.5, 1.0], [0.0, 2.0, 3.0]])

    def together(search: Any, choice: tuple[int, ...]) -> float:
        return float(prices[range(4), choice].sum()) + 3.0 * (choice[0] > 0) * (choice[3] > 0)

    monkeypatch.setattr(allocation.Search, "_cost_together", together)
    monkeypatch.setattr(method, "measured_rises", lambda weights, *_, **__: [np.array([0.0, 0.1, 0.2])] * len(weights))
    used, counts = context(data), list(numbers(model).values())
    mixed(model, config(average_bits=4), used)
    found = tuple((8, 4, 2).index(bits) for bits in chosen(used).values())

    def mean(one: tuple[int, ...]) -> float:
        return sum((8, 4, 2)[place] * count for place, count in zip(one, counts, strict=True)) / sum(counts)

    best = min(together(0, one) for one in itertools.product(range(3), repeat=4) if mean(one) <= 4)
    assert together(0, found) == best
    assert together(0, found) < together(0, (1, 1, 1, 1))
    assert mean(found) <= 4


def test_where_the_costs_mislead_it_takes_one_width_for_all(
    model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: what costs most is said to cost least."""
    original = method.measured_rises
    monkeypatch.setattr(method, "measured_rises", lambda *args, **rest: [-one for one in original(*args, **rest)])
    used = context(data)
    mixed(model, config(average_bits=4, exchanges=0), used)
    assert set(chosen(used).values()) == {4}


def test_a_choice_whose_outputs_are_no_numbers_is_not_taken(
    model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(rounding: Rounding, changes: Any) -> float:
        widths = [codes for _, codes in changes]
        return float("nan") if len(widths) == 4 and len(set(widths)) > 1 else float(len(widths))

    monkeypatch.setattr(Rounding, "distance", cost)
    used = context(data)
    mixed(model, config(average_bits=5), used)
    assert set(chosen(used).values()) == {4}


@pytest.mark.parametrize("bound", ["1300 B", pytest.param("55%", marks=pytest.mark.slow)])
def test_a_file_whose_codes_need_room_of_their_own_keeps_the_bound(
    bound: str, model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each weight of fewer than 8 bits took 50 bytes beside its codes, which nobody said before."""
    counts = list(numbers(model).values())

    def taken(search: Any, net: Model, choice: tuple[int, ...]) -> int:
        pairs = zip(choice, counts, strict=bool(choice))
        stored = [(8, 4, 2)[place] * count // 8 + (50 if place else 0) for place, count in pairs]
        return sum(stored) if choice else 4000

    monkeypatch.setattr(allocation.Search, "_file_bytes", taken)
    used = context(data)
    mixed(model, config(size=bound), used)
    limit = {"1300 B": 1300, "55%": 2200}[bound]
    choice = tuple((8, 4, 2).index(bits) for bits in chosen(used).values())
    costs: list[dict[str, Any]] = used.notes["sensitivities"]  # type: ignore[assignment]

    def cost(one: tuple[int, ...]) -> float:
        return sum(entry["added_cost"][place] for entry, place in zip(costs, one, strict=True))

    assert taken(None, model, choice) <= limit
    # not worse than the best within a bound that leaves that room to all of them
    assert cost(choice) <= min(
        cost(one) for one in itertools.product(range(3), repeat=4) if taken(None, model, one) <= limit - 50 * 3
    )


@pytest.mark.slow
def test_the_file_keeps_the_bound(model: Model, data: Data, tmp_path: Path) -> None:
    used = context(data)
    path = tmp_path / "model.onnx"
    device = used.device
    few, many = (
        size_bytes(export_onnx(quantize_static(model, FREE.model_copy(update={"weight_bits": bits}), used), path).path)
        for bits in (2, 8)
    )
    bound = (few + many) // 2
    result = mixed(model, config(size=f"{bound} B"), used)
    assert len(set(chosen(used).values())) > 1
    assert 0.85 * bound < size_bytes(export_onnx(result, path, device=device).path) <= bound
    with pytest.raises(StageError, match=r"the smallest file has [\d,]+ bytes") as caught:
        mixed(model, config(size="100 B"), context(data))
    assert caught.value.where == "stages.quantize.size"


def test_a_file_of_levels_that_is_larger_than_its_bound_is_told(
    model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each table of levels took 100 bytes beside codes that take none."""

    def taken(search: Any, net: Model) -> int:
        found = [op_name(node) for node in calls(net.graph)]
        return 1000 + 100 * found.count("quantize_levels") if "quantize_affine" in found else 4000

    monkeypatch.setattr(allocation.Search, "_exported_bytes", taken)
    used = context(data, apot=ApotConfig(batch_norm_samples=64))
    used.progress = notices = Notices()
    mixed(model, config(by="apot", bits=[4], size="1100 B"), used)
    (told,) = (text for text in notices.told if "`size` allows" in text)
    assert "the file has 1,200 bytes, and `size` allows 1,100" in told  # the two inner layers


def test_what_a_stage_fixes_stays(model: Model, data: Data) -> None:
    layers = {"wide": {"weight_bits": 5, "activation_bits": 6}, "back": {"activation_bits": 4}}
    own = StaticConfig.model_validate({"skip": ["stem.*"], "layers": layers})
    used = context(data, own=own)
    result = mixed(model, config(by="own", average_bits=4.95), used)
    assert chosen(used) == {"wide": 5, "back": 4, "head": 8}  # the head is at an output
    assert set(present_bits(result).bits.values()) == {(5, 6), (4, 4), (8, 8)}


def test_a_stage_that_trains_trains_the_mixed_model(model: Model, data: Data) -> None:
    own = LsqConfig(first_last_bits=2, activation_bits=8, batch_norm_samples=64)
    used = context(data, lsq=own)
    result = mixed(model, config(by="lsq", average_bits=3), used)
    assert sorted(bits for bits, _ in present_bits(result).bits.values()) == sorted(chosen(used).values())
    assert len(used.notes["history"]) == 1  # type: ignore[arg-type]
    assert "stage/lsq" in used.trace.reads


def test_what_cannot_be_is_told(model: Model, data: Data) -> None:
    with pytest.raises(StageError, match="the smallest mean is") as caught:
        mixed(model, MixedConfig(average_bits=2), context(data))
    assert "first_last_bits" in str(caught.value)
    with pytest.raises(StageError, match="there is no stage 'fre'"):
        mixed(model, config(by="fre", average_bits=4), context(data))
    with pytest.raises(StageError, match="'again' is quantize/mixed, which takes no bits by layer"):
        mixed(model, config(by="again", average_bits=4), context(data, again=MixedConfig(average_bits=4)))
    held = StaticConfig.model_validate({"max_drop": "1%"})
    with pytest.raises(StageError, match="not on quality"):
        mixed(model, config(by="held", average_bits=4), context(data, held=held))
    aware = StaticConfig(latency_aware=True)
    with pytest.raises(StageError, match="all layers that can be quantized"):
        mixed(model, config(by="aware", average_bits=4), context(data, aware=aware))
    with pytest.raises(ValidationError, match="give exactly one of average_bits and size"):
        MixedConfig()
    with pytest.raises(ValidationError, match="the bits of weights do not change a latency"):
        MixedConfig.model_validate({"latency": 0.5})


@pytest.mark.parametrize("sensitivity", [pytest.param("outputs", marks=pytest.mark.slow), "hessian"])
def test_a_killed_run_goes_on_to_the_same_weights(
    sensitivity: str, model: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(average_bits=4, sensitivity=sensitivity, probes=3, samples=128)
    around = context(data)
    whole = mixed(model, settings, around)
    contexts: list[Context] = []

    def run() -> Model:
        contexts.append(context(data, tmp_path))
        return mixed(model, settings, contexts[-1])

    resumed = run_through_kills(run, monkeypatch, saves=(1, 3))
    assert resumed.fingerprint() == whole.fingerprint()
    assert contexts[-1].notes == around.notes


@pytest.mark.parametrize("sensitivity", ["outputs", "hessian"])
def test_where_all_layers_are_first_or_last_there_is_nothing_to_choose(sensitivity: str, data: Data) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    used = context(data)
    mixed(
        Model.capture(net, (torch.randn(2, 1, 8, 8),)), config(by=None, average_bits=8, sensitivity=sensitivity), used
    )
    assert set(chosen(used).values()) == {8}
