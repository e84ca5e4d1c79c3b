"""Learned step sizes: where they start, what training does with them, and that folding leaves the codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data, Split
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.mode import mode_arguments
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.quantize import aware
from mil_cli.stages.quantize.lsq import LsqConfig, quantize
from mil_cli.stages.quantize.settle import settle
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.registry import StageConfig, config_type, function_of
from mil_cli.stages.train.supervised import SupervisedConfig
from tests.stages.contexts import run_through_kills
from tests.stages.quantize.striped import (
    accuracy,
    codes,
    context,
    images,
    loss,
    quantizers,
    scales,
    small_mlp,
    small_resnet,
    small_vit,
)


def config(**settings: Any) -> LsqConfig:
    return LsqConfig(**{"weight_bits": 3, "activation_bits": 3, "batch_norm_samples": 256, **settings})


def test_it_learns_what_rounding_alone_loses(model: Model, data: Data) -> None:
    before = model.fingerprint()
    used = context(data)
    low = {"weight_bits": 2, "activation_bits": 2, "first_last_bits": 2}
    result = quantize(model, config(**low, trainer={"epochs": 4}), used)
    rounded = quantize_static(model, StaticConfig(**low), context(data))
    assert model.fingerprint() == before
    assert accuracy(model, data) > 0.95
    assert loss(result, data) < 0.7 * loss(rounded, data)
    assert accuracy(result, data) > accuracy(model, data) - 0.06
    assert used.notes["quantized_layers"] == 3
    assert len(used.notes["history"]) == 4  # type: ignore[arg-type]
    assert {"device/int8", "data/train", "seed", "task", "trainer"} <= set(used.trace.reads)


def test_the_result_has_the_form_of_static_quantization(model: Model, data: Data, tmp_path: Path) -> None:
    result = quantize(model, config(trainer={"epochs": 1}), context(data))
    static = quantize_static(model, StaticConfig(weight_bits=3, activation_bits=3), context(data))
    found, expected = (sorted(tuple(value.shape) for value in net.state_dict().values()) for net in (result, static))
    assert found == expected
    assert [op_name(node) for node in calls(result.graph)] == [op_name(node) for node in calls(static.graph)]
    assert result.num_params() == static.num_params()
    assert {name for name, _ in result.named_parameters()} == {name for name, _ in static.named_parameters()}
    assert all(scale.dtype == torch.float32 and bool((scale > 0).all()) for scale in scales(result).values())
    assert not result.training
    result.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(x), result(x))
    assert loaded.fingerprint() == result.fingerprint()
    loss = nn.functional.cross_entropy(loaded.train()(x), torch.zeros(5, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "own",
    [
        pytest.param({"weight_bits": 4}, marks=pytest.mark.slow),
        {"weight_bits": 4, "activation_bits": 5, "per_channel": False},
    ],
)
def test_layers_train_with_bits_of_their_own(own: dict[str, Any], model: Model, data: Data) -> None:
    layers = {"body.*": own}
    result = quantize(model, config(layers=layers, trainer={"epochs": 1}), context(data))
    static = StaticConfig.model_validate({"weight_bits": 3, "activation_bits": 3, "layers": layers})

    def codes(net: Model) -> list[tuple[object, ...]]:
        words = ("axis", "quant_min", "quant_max")
        return [tuple(get_argument(node, word) for word in words) for node in quantizers(net)]

    assert codes(result) == codes(quantize_static(model, static, context(data)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_start_by_the_formula_of_the_paper(
    per_channel: bool, model: Model, data: Data, inserted: dict[str, Model]
) -> None:
    quantize(model, config(initialization="mean", per_channel=per_channel, trainer={"epochs": 1}), context(data))
    start = inserted["start"]
    folded = fold_batch_norm(model)
    source = model if per_channel else folded
    body = dict(source.named_parameters())["body.0.weight"].detach()
    mean = body.abs().mean((1, 2, 3)) if per_channel else body.abs().mean()
    found = get_attribute(start.graph, "quantizers.body_0_weight.scale")
    torch.testing.assert_close(found.detach(), 2 * mean / math.sqrt(3), rtol=1e-5, atol=0)
    # Rectified values: unsigned codes 0 to 7. The calibration samples are the train split, each once.
    with torch.no_grad():
        stem = nn.functional.conv2d(
            images(data.train), folded.state_dict()["stem.0.weight"], folded.state_dict()["stem.0.bias"], padding=1
        )
        mean = torch.relu(stem).mean()
    relu = next(node for node in quantizers(start) if node.args[4:] == (0, 7))
    learned = relu.args[1]
    assert op_name(learned) == "learned_scale"
    scale = get_attribute(start.graph, str(learned.args[0].target))
    torch.testing.assert_close(scale.detach(), 2 * mean / math.sqrt(7), rtol=1e-4, atol=0)
    # The factor of an activation counts the features of one sample, that of a weight what shares the scale.
    assert learned.args[1] == pytest.approx(1 / math.sqrt(8 * 8 * 8 * 7))
    weight = next(node for node in quantizers(start) if str(node.args[0].target) == "body.0.weight")
    assert weight.args[1].args[1] == pytest.approx(1 / math.sqrt((72 if per_channel else 576) * 3))


@pytest.mark.parametrize("initialization", ["mse", pytest.param("mean", marks=pytest.mark.slow)])
def test_values_below_zero_get_a_zero_point_that_stays(
    initialization: str, model: Model, data: Data, inserted: dict[str, Model]
) -> None:
    result = quantize(model, config(initialization=initialization, trainer={"epochs": 1}), context(data))
    image = next(node for node in quantizers(result) if node.args[0].op == "placeholder")
    zero_point = get_attribute(result.graph, str(get_argument(image, "zero_point").target))
    assert get_argument(image, "quant_max") == 255  # a first layer reads it
    assert 64 < int(zero_point) < 192
    began = get_attribute(inserted["start"].graph, str(get_argument(image, "zero_point").target))
    assert torch.equal(zero_point, began)


def test_folding_after_training_changes_neither_outputs_nor_codes(
    model: Model, data: Data, inserted: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aware, "settle_biases", lambda graph: None)  # which rounds them, and so changes outputs
    frozen = config(batch_norm="freeze", trainer={"epochs": 1})
    result = quantize(model, frozen, context(data))
    trained = inserted["trained"]
    settle(trained.graph)
    assert sum(op_name(node) == "batch_norm" for node in calls(trained.graph)) == 2
    assert not any(op_name(node) == "batch_norm" for node in calls(result.graph))
    with torch.no_grad():
        expected, found = trained(images(data.val)), result(images(data.val))
    # A sum on the border of two codes may fall to the other side by float rounding: rarely, and by one step.
    assert ((expected - found).abs() < 1e-4).float().mean() > 0.95
    assert (expected - found).abs().max() < 0.3
    stem, body = (trained.state_dict()[f"{norm}.weight"] for norm in ("stem.1", "body.1"))
    assert float(model.state_dict()["body.1.weight"].min()) < 0 < float(body.min())
    assert float(stem.min()) < 0  # the first layer has 8 bits: its codes are symmetric, and may turn around
    before, after = codes(trained), codes(result)
    assert before.keys() == after.keys()
    before["stem.0.weight"] *= stem.sign().int().reshape(-1, 1, 1, 1)
    for name, values in before.items():
        assert torch.equal(after[name], values)
    assert int(after["body.0.weight"].min()) == -4


def test_frozen_norms_keep_their_statistics(model: Model, data: Data, inserted: dict[str, Model]) -> None:
    quantize(model, config(batch_norm="freeze", trainer={"epochs": 1}), context(data))
    for name, value in inserted["start"].state_dict().items():
        if "running" in name:
            assert torch.equal(inserted["trained"].state_dict()[name], value)
            assert torch.equal(model.state_dict()[name].abs(), value.abs())  # turned around where gamma is negative
    quantize(model, config(trainer={"epochs": 1}), context(data))
    changed = inserted["trained"].state_dict()
    assert not torch.equal(changed["body.1.running_mean"], model.state_dict()["body.1.running_mean"])


def test_norms_that_cannot_fold_train_again_after_a_freeze(data: Data) -> None:
    class NormFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 3)
            self.plain = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.conv(self.norm(x))).amax((2, 3))

    torch.manual_seed(0)
    net = Model.capture(NormFirst(), (torch.randn(2, 1, 8, 8),))
    result = quantize(net, config(batch_norm="freeze", trainer={"epochs": 1}), context(data))
    norm, plain = (node for node in calls(result.graph) if op_name(node) == "batch_norm")
    assert mode_arguments(norm)["training"] == (False, True)
    assert mode_arguments(plain)["training"] == (True, True)
    assert torch.equal(result.state_dict()["norm.running_mean"], net.state_dict()["norm.running_mean"])
    fresh = quantize(net, config(trainer={"epochs": 1}), context(data))
    assert not torch.equal(fresh.state_dict()["norm.running_mean"], net.state_dict()["norm.running_mean"])


def test_scales_stay_positive_whatever_the_learning_rate(model: Model, data: Data) -> None:
    wild = {"epochs": 1, "learning_rate": 3.0, "scheduler": "constant", "divergence": None}
    result = quantize(model, config(trainer=wild), context(data))
    assert all(bool((scale > 0).all()) for scale in scales(result).values())


class Stateful(nn.Module):
    """What comes in is an image, and a state that is zero in all that calibration and training see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.carried, self.head = nn.Conv2d(1, 8, 1, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        image, state = x.chunk(2, 1)
        x = self.second(torch.relu(self.first(image) + self.carried(state)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(("per_channel", "low"), [(True, {}), (False, {"weight_bits": 8, "activation_bits": 8})])
def test_a_state_that_was_always_zero_stays_float(per_channel: bool, low: dict[str, int], data: Data) -> None:
    def beside_zeros(split: Split) -> TensorSplit:
        (seen, labels) = (torch.cat(parts) for parts in zip(*split.batches(64), strict=True))
        return TensorSplit((torch.cat([seen, torch.zeros_like(seen)], 1), labels))

    splits = {name: beside_zeros(getattr(data, name)) for name in ("train", "val", "test")}
    torch.manual_seed(0)
    net = Model.capture(Stateful().eval(), (torch.randn(2, 2, 8, 8),))
    used = context(Data(name="states", **splits))
    result = quantize(net, config(per_channel=per_channel, **low, trainer={"epochs": 1}), used)
    assert used.notes["kept_float"] == {"carried": "its input was nothing but zeros in calibration"}
    assert used.notes["quantized_layers"] == 3
    assert min(float(scale.min()) for scale in scales(result).values()) > 1e-5
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert not torch.equal(result(x), result(torch.cat([x[:, :1], torch.zeros(16, 1, 8, 8)], 1)))


def test_one_scale_for_a_weight_where_the_device_wants_it(model: Model, data: Data) -> None:
    result = quantize(model, config(per_channel=False, trainer={"epochs": 2}), context(data))
    assert all(scale.ndim == 0 for scale in scales(result).values())
    assert accuracy(result, data) > 0.85


def test_the_named_stage_gives_the_loss(model: Model, data: Data) -> None:
    stages: dict[str, StageConfig] = {
        "recover": SoftLabelsConfig(weight=1.0, trainer={"epochs": 7}),
        "plain": SupervisedConfig(trainer={"epochs": 7}),
    }
    # A teacher that turns the labels around: whoever learns from it alone is wrong.
    teacher = model.clone()
    with torch.no_grad():
        for name in ("head.weight", "head.bias"):
            value = teacher.state_dict()[name]
            value.copy_(value.roll(1, 0))
    changes = {"original": teacher, "stages": stages}
    used = context(data, **changes)
    taught = quantize(model, config(distill="recover", trainer={"epochs": 6, "learning_rate": 0.1}), used)
    assert accuracy(taught, data) < 0.2
    assert {"stage/recover", "original"} <= set(used.trace.reads)
    assert len(used.notes["history"]) == 6  # type: ignore[arg-type]
    used = context(data, **changes)
    told = quantize(model, config(distill="plain", trainer={"epochs": 1}), used)
    alone = quantize(model, config(trainer={"epochs": 1}), context(data))
    assert told.fingerprint() == alone.fingerprint()
    assert "original" not in used.trace.reads


def test_killed_and_resumed_is_bit_identical(
    model: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(trainer={"epochs": 2, "checkpoint_every_seconds": 0})
    whole = quantize(model, settings, context(data, workspace=tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: quantize(model, settings, context(data, workspace=tmp_path / "killed")),
        monkeypatch,
        saves=(3, 7, 11),
    )
    assert resumed.fingerprint() == whole.fingerprint()
    assert list((tmp_path / "killed").iterdir())


def test_problems_are_named(model: Model, data: Data) -> None:
    stages: dict[str, StageConfig] = {"recover": SoftLabelsConfig(), "cut": MagnitudeConfig(macs=0.5)}
    with pytest.raises(StageError, match=r"no stage 'recovr'.*\n.*did you mean 'recover'"):
        quantize(model, config(distill="recovr"), context(data, stages=stages))
    with pytest.raises(StageError, match="'cut' does not train"):
        quantize(model, config(distill="cut"), context(data, stages=stages))
    with pytest.raises(StageError, match="no layer of the model can be quantized"):
        quantize(model, config(skip=("*",)), context(data))
    quantized = quantize_static(model, StaticConfig(), context(data))
    with pytest.raises(StageError, match="quantized already"):
        quantize(quantized, config(), context(data))
    for wrong in ({"weight_bits": 1}, {"activation_bits": 9}, {"batch_norm": "off"}, {"initialization": "max"}):
        with pytest.raises(ValidationError):
            LsqConfig.model_validate(wrong)
    assert config_type("quantize", "lsq") is LsqConfig
    assert function_of(LsqConfig()) is quantize


@pytest.mark.parametrize("build", [small_mlp, pytest.param(small_vit, marks=pytest.mark.slow)])
def test_other_architectures(build: Callable[[], nn.Module], data: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Model.capture(build(), (torch.randn(2, 1, 8, 8),))
    result = quantize(net, config(weight_bits=4, activation_bits=8, trainer={"epochs": 3}), context(data))
    assert accuracy(result, data) > 0.5
    path = export_onnx(result, tmp_path / "model.onnx").path
    assert integer_coverage(path).float_layers == ()
    check_parity(result, path, [((images(data.val),), {})])


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"),
    [(4, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 8), (4, 8)))],
)
def test_the_file_computes_the_same_on_integer_kernels(
    weight_bits: int, activation_bits: int, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Model.capture(small_resnet(), (torch.randn(2, 1, 8, 8),))
    settings = config(weight_bits=weight_bits, activation_bits=activation_bits, trainer={"epochs": 1})
    result = quantize(net, settings, context(data))
    path = export_onnx(result, tmp_path / "model.onnx").path
    coverage = integer_coverage(path)
    assert coverage.float_layers == ()
    assert coverage.integer_layers == len({name for name in scales(result) if name.endswith("_weight.scale")})
    check_parity(result, path, [((images(data.val),), {})])
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    inner = onnx.TensorProto.INT8 if weight_bits == 8 else onnx.TensorProto.INT4
    assert kinds == {inner, onnx.TensorProto.INT8}
