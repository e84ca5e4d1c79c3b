from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.errors import StageError
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.models.vit import vit
from mil_cli.stages.context import Context
from mil_cli.stages.quantize import calibrate
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.stages.registry import check_order, config_type, function_of
from mil_cli.stages.surroundings import Surroundings, fingerprint_of
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


@cache
def captured() -> Model:
    torch.manual_seed(0)
    module = Net().train()
    with torch.no_grad():
        for _ in range(10):
            module(torch.randn(16, 1, 8, 8))
    return Model.capture(module.eval(), (torch.randn(2, 1, 8, 8),))


def make_model() -> Model:
    """Return a copy of the captured net."""
    torch.manual_seed(0)
    return captured().clone()


def context(
    *, samples: int = 256, spoil: bool = False, channels: int = 1, silent_channel: int | None = None, **rules: Any
) -> Context:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, channels, 8, 8, generator=generator)
    if silent_channel is not None:
        images[:, silent_channel] = 0
    split = TensorSplit((images, torch.zeros(samples, dtype=torch.int64)))
    if spoil:
        images[:, 0, 0, 0] = float("nan")
    form: dict[str, Any] = {"activations": "uint8", "reduce_range": False, **rules}
    around = Surroundings(
        seed=0,
        task=Classification(),
        data=Data(name="noise", train=split, val=split, test=split),
        device=DeviceProfile(name="test", int8=Int8Form(**form)),
        trainer=TrainerConfig(),
        goals={},
        stages={},
        load_source=lambda source: pytest.fail("no source is needed"),
        source_fingerprint=str,
    )
    return Context(name="quantize", surroundings=around, progress=SilentProgress())


def quantizers(model: Model) -> list[Any]:
    return [node for node in calls(model.graph) if op_name(node) == "quantize_affine"]


def noise(model: Model, quantized: Model) -> float:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = model(x), quantized(x)
    return float((expected - found).norm() / expected.norm())


def test_the_input_is_untouched_and_the_result_is_close() -> None:
    model = make_model()
    before = model.fingerprint()
    used = context()
    quantized = quantize(model, StaticConfig(), used)
    assert model.fingerprint() == before
    assert noise(model, quantized) < 0.05
    assert not any(op_name(node) == "batch_norm" for node in calls(quantized.graph))
    assert quantized.spec.inputs == model.spec.inputs
    assert used.notes["policy"] == "cnn"
    assert used.notes["quantized_layers"] == 3
    assert used.notes["kept_float"] == {}
    assert {"device/int8", "data/train", "seed", "task"} <= set(used.trace.reads)
    assert "data/val" not in used.trace.reads


def test_rectified_values_start_at_code_zero() -> None:
    quantized = quantize(make_model(), StaticConfig(observer="min_max"), context())
    for node in quantizers(quantized):
        source = get_argument(node, "x")
        if op_name(source) == "relu":
            zero_point = quantized.graph.get_buffer(str(get_argument(node, "zero_point").target))
            assert int(zero_point) == get_argument(node, "quant_min") == 0


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("weight_observer", ["min_max", "mse"])
def test_more_bits_are_closer(observer: Any, weight_observer: Any) -> None:
    model = make_model()
    errors = []
    for bits in (8, 6, 4):
        config = StaticConfig(
            weight_bits=bits,
            activation_bits=bits,
            first_last_bits=bits,
            observer=observer,
            weight_observer=weight_observer,
            percentile=99.9,
        )
        errors.append(noise(model, quantize(model, config, context())))
    assert errors[0] < errors[1] < errors[2]


class Stateful(nn.Module):
    """A recurrent step: what comes in is an image, and a state that is zero in all that calibration sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.carried, self.dead = nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)
        nn.init.constant_(self.dead.bias, -100.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        image, state = x.chunk(2, 1)
        x = torch.relu(self.first(image))
        x = torch.relu(self.second(x) + self.carried(state)) + torch.relu(self.dead(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_a_state_that_was_always_zero_stays_float(observer: Any) -> None:
    torch.manual_seed(0)
    model = Model.capture(Stateful().eval(), (torch.randn(2, 2, 8, 8),))
    used = context(channels=2, silent_channel=1)
    quantized = quantize(model, StaticConfig(observer=observer), used)
    assert used.notes["kept_float"] == {"carried": "its input was nothing but zeros in calibration"}
    assert used.notes["quantized_layers"] == 4
    paths = [str(get_argument(node, "scale").target) for node in quantizers(quantized)]
    assert min(float(quantized.graph.get_buffer(path).min()) for path in paths) > 1e-5
    first = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    first[:, 1] = 0
    later = first.clone()
    later[:, 1] = 0.3 * first[:, 0].flip(0)  # the state of a later call
    with torch.no_grad():
        effect, kept = (one(later) - one(first) for one in (model, quantized))
    assert float((effect - kept).norm() / effect.norm()) < 0.25


def test_a_model_of_which_only_zeros_are_seen_is_refused() -> None:
    model = Model.capture(nn.Conv2d(1, 4, 3).eval(), (torch.randn(2, 1, 8, 8),))
    with pytest.raises(StageError, match=r"no layer of the model can be quantized") as caught:
        quantize(model, StaticConfig(), context(silent_channel=0))
    assert "nothing but zeros" in str(caught.value)


def test_device_rules_and_their_overrides() -> None:
    model = make_model()

    def ranges(config: StaticConfig, **rules: Any) -> set[tuple[int | None, int, int]]:
        quantized = quantize(model, config, context(**rules))
        return {
            (get_argument(node, "axis"), get_argument(node, "quant_min"), get_argument(node, "quant_max"))
            for node in quantizers(quantized)
        }

    assert ranges(StaticConfig()) == {(None, 0, 255), (0, -127, 127)}
    assert ranges(StaticConfig(), reduce_range=True) == {(None, 0, 255), (0, -64, 64)}
    assert ranges(StaticConfig(), activations="int8", per_channel=False) == {(None, -128, 127), (None, -127, 127)}
    assert ranges(StaticConfig(activations="uint8", reduce_range=False), activations="int8", reduce_range=True) == {
        (None, 0, 255),
        (0, -127, 127),
    }
    mixed = ranges(StaticConfig(weight_bits=4, activation_bits=6))
    # first and last layer keep 8 bits, and so does what they read: the input and the mean
    assert mixed == {(None, 0, 63), (None, 0, 255), (0, -127, 127), (0, -8, 7)}


def layer_codes(model: Model) -> dict[str, tuple[int | None, int, int]]:
    """Return layer -> axis and codes of its weight, and "layer.input" -> those of what it reads."""
    found = {}
    for node in calls(model.graph):
        if op_name(node) in ("conv2d", "linear"):
            weight, source = get_argument(node, "weight"), get_argument(node, "input")
            name = str(get_argument(weight, "x").target).removesuffix(".weight")
            for key, quantizer in ((name, weight), (f"{name}.input", source)):
                found[key] = tuple(get_argument(quantizer, word) for word in ("axis", "quant_min", "quant_max"))
    return found


def test_layers_have_bits_of_their_own() -> None:
    config = StaticConfig.model_validate(
        {
            "weight_bits": 6,
            "activation_bits": 6,
            "layers": {
                "*": {"weight_bits": 5},
                "body": {"weight_bits": 3, "activation_bits": 4},
                "head": {"activation_bits": 5, "per_channel": False},
                "b?dy.0": {"weight_bits": 4},
            },
        }
    )
    used = context()
    quantized = quantize(make_model(), config, used)
    assert layer_codes(quantized) == {
        "stem.0": (0, -16, 15),  # what is asked for by name counts for the first layer too
        "stem.0.input": (None, 0, 255),
        "body.0": (0, -8, 7),  # the later pattern wins, and leaves what it does not name
        "body.0.input": (None, 0, 15),
        "head": (None, -16, 15),
        "head.input": (None, 0, 31),
    }
    noted = used.notes["layers"]
    assert noted[1] == {"name": "body.0", "weight_bits": 4, "activation_bits": 4, "per_channel": True}  # type: ignore[index]


class Twins(nn.Module):
    """Two layers that read one value, and a sum that reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(one, 4, 3, padding=1) for one in (1, 4, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        logits: Tensor = self.head((x + self.left(x) + self.right(x)).mean((2, 3)))
        return logits


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    torch.manual_seed(0)
    model = Model.capture(Twins().eval(), (torch.randn(2, 1, 8, 8),))

    def inputs(**settings: Any) -> tuple[Any, Any, Any]:
        codes = layer_codes(quantize(model, StaticConfig.model_validate(settings), context()))
        return tuple(codes[f"{name}.input"][2] for name in ("left", "right", "head"))  # type: ignore[return-value]

    few = {"left": {"activation_bits": 3}, "right": {"activation_bits": 5}}
    assert inputs(layers=few) == (31, 31, 255)
    assert inputs(layers={"left": {"activation_bits": 3}}) == (7, 255, 255)
    # more than what lies between layers has: then that has as much
    assert inputs(activation_bits=4, first_last_bits=4, layers={"left": {"activation_bits": 6}}) == (63, 63, 15)


def test_the_order_of_patterns_is_part_of_the_settings() -> None:
    one = StaticConfig.model_validate({"layers": {"*": {"weight_bits": 4}, "head": {"weight_bits": 8}}})
    other = StaticConfig.model_validate({"layers": {"head": {"weight_bits": 8}, "*": {"weight_bits": 4}}})
    assert fingerprint_of(one.model_dump(mode="json")) != fingerprint_of(other.model_dump(mode="json"))
    assert StaticConfig.model_validate(json.loads(one.model_dump_json())) == one
    assert StaticConfig.model_validate(one.model_dump()) == one


def test_a_pattern_of_bits_that_fits_nothing_is_refused() -> None:
    with pytest.raises(StageError, match="'boddy' fits no layer") as caught:
        quantize(make_model(), StaticConfig.model_validate({"layers": {"boddy": {"weight_bits": 4}}}), context())
    assert caught.value.where == "layers"
    assert "did you mean 'body.0'" in str(caught.value)
    with pytest.raises(ValidationError, match="less than or equal to 8"):
        StaticConfig.model_validate({"layers": {"body": {"weight_bits": 9}}})
    for wrong in ([1], ["body"], "body"):
        with pytest.raises(ValidationError, match="valid dictionary"):
            StaticConfig.model_validate({"layers": wrong})
    # a layer that is left float may be named: the report says why it is
    quantize(make_model(), StaticConfig.model_validate({"skip": ["head"], "layers": {"head": {}}}), context())


def test_same_seed_same_result() -> None:
    model = make_model()
    first, second = (quantize(model, StaticConfig(), context()) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_result_trains_clones_and_switches_mode() -> None:
    quantized = quantize(make_model(), StaticConfig(weight_bits=4, activation_bits=4), context())
    student = quantized.clone().train()
    labels = torch.randint(0, 4, (64,))
    x = torch.randn(64, 1, 8, 8) * (labels + 1)[:, None, None, None] / 4
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(student(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not torch.equal(student.eval()(x), quantized(x))


def test_calibration_stops_at_what_was_asked() -> None:
    model = make_model()
    few = quantize(model, StaticConfig(calibration_samples=16, calibration_batch_size=8), context())
    many = quantize(model, StaticConfig(calibration_samples=256), context())
    assert few.fingerprint() != many.fingerprint()
    more_than_there_are = quantize(model, StaticConfig(calibration_samples=10_000), context())
    assert more_than_there_are.fingerprint() == many.fingerprint()


def test_problems_are_named() -> None:
    model = make_model()
    quantized = quantize(model, StaticConfig(), context())
    with pytest.raises(StageError, match="quantized already"):
        quantize(quantized, StaticConfig(), context())
    with pytest.raises(StageError, match="fits no layer"):
        quantize(model, StaticConfig(skip=("nothing",)), context())
    with pytest.raises(StageError, match="no layer of the model can be quantized"):
        quantize(model, StaticConfig(skip=("*",)), context())
    with pytest.raises(StageError, match="NaN"):
        quantize(model, StaticConfig(), context(spoil=True))
    with pytest.raises(ValidationError):
        StaticConfig(weight_bits=9)


def test_registered_and_not_twice_in_a_chain() -> None:
    assert config_type("quantize", "static") is StaticConfig
    assert function_of(StaticConfig()) is quantize
    assert len(check_order([("a", StaticConfig()), ("b", StaticConfig())])) == 1


def test_an_archive_keeps_the_fingerprint_of_a_quantized_transformer(tmp_path: Path) -> None:
    net = vit(dim=8, depth=1, heads=2, image_size=8, patch=4).eval()
    quantized = quantize(Model.capture(net, (torch.randn(2, 1, 8, 8),)), StaticConfig(), context())
    quantized.save(tmp_path / "model.pt2")
    assert Model.load(tmp_path / "model.pt2").fingerprint() == quantized.fingerprint()


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x[:, :4] += 5.0
        logits: Tensor = self.head(torch.relu(self.second(x)))
        return logits


def test_values_that_are_overwritten_are_read_as_they_are_then() -> None:
    torch.manual_seed(0)
    model = Model.capture(Written().eval(), (torch.randn(2, 1, 8, 8),))
    used = context()
    assert noise(model, quantize(model, StaticConfig(), used)) < 0.02
    assert used.notes["quantized_layers"] == 2


class Counted(SilentProgress):
    """Keeps how far each piece of work came, and how far it was to come."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None]] = []

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Any]:
        steps: list[int] = [done]

        class Bar:
            def advance(self, by: int = 1, *, note: str = "") -> None:
                steps[0] += by

        yield Bar()
        self.seen.append((steps[0], total))


@pytest.mark.parametrize("samples", [40, 130, 256])
def test_with_fewer_samples_than_asked_for_progress_ends_at_its_end(samples: int) -> None:
    used = context(samples=samples)
    used.progress = counted = Counted()
    quantize(make_model(), StaticConfig(bias_correction=True, calibration_samples=200), used)
    assert len(counted.seen) == 3
    assert all(done == total for done, total in counted.seen)
    assert used.notes["calibration_samples"] == min(samples, 200)


def test_values_of_all_widths_are_watched_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = calibrate.calibrate

    def counted(*arguments: Any, **options: Any) -> int:
        passes.append(len(arguments[1]))
        return original(*arguments, **options)

    monkeypatch.setattr(calibrate, "calibrate", counted)
    result = quantize(make_model(), StaticConfig(activation_bits=4, bias_correction=False), context())
    assert len(passes) == 1
    widths = {get_argument(node, "quant_max") for node in calls(result.graph) if op_name(node) == "quantize_affine"}
    assert {15, 255} <= widths
