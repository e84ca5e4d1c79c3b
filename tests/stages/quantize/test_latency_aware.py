"""No file is slower than the float one: what measurements decide, what is told, kills; and a net that is hard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.measured import latency_ratios
from mil_cli.stages.quantize import latency_aware
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import function_of
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import Notices, make_context, run_through_kills


class Measured:
    """Stands for the measurements: says which layers gain, and what files take; counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gaining: set[str], ratios: Sequence[float]) -> None:
        self.asked: list[str] = []
        self._ratios = ratios
        monkeypatch.setattr(latency_aware, "gaining_layers", lambda *_: self._told("operators", gaining))
        monkeypatch.setattr(latency_aware, "latency_ratios", lambda models, *_: self._told("files", self._of(models)))

    def _of(self, models: Sequence[Model]) -> list[float]:
        return list(self._ratios[: len(models)])

    def _told(self, what: str, answer: Any) -> Any:
        self.asked.append(what)
        return answer


def names(model: Model) -> int:
    return len(present_bits(model).bits)


@pytest.mark.parametrize(
    ("gaining", "ratios", "quantized"),
    [
        ({"stem.0", "head"}, [0.9, 0.8], 2),
        ({"stem.0", "head"}, [0.7, 0.8], 3),
        ({"stem.0", "body.0", "head"}, [0.9], 3),
        (set(), [0.9], 3),
        ({"stem.0", "head"}, [1.2, 1.1], 0),
    ],
)
def test_the_fastest_file_decides(
    gaining: set[str], ratios: list[float], quantized: int, model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, gaining, ratios)
    told = Notices()
    context = make_context(data, progress=told)
    before = model.fingerprint()
    config = StaticConfig(latency_aware=True, calibration_samples=64)
    result = function_of(config)(model, config, context)
    assert names(result) == quantized
    assert model.fingerprint() == before
    assert list(context.notes["latency_ratios"].values()) == ratios  # type: ignore[attr-defined]
    left = context.notes["left_for_latency"]
    if quantized == 2:
        assert left == ["body.0"]
        assert context.notes["kept_float"] == {"body.0": "it is no faster with integers on this device"}
    elif quantized == 3:
        assert left == []
        assert context.notes["kept_float"] == {}
    else:
        assert left is None
        assert any("nothing is quantized" in text for text in told.told)
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(result(x), model(x))


def test_methods_that_train_leave_the_same_layers(model: Model, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch, {"stem.0", "head"}, [0.9, 0.8])
    context = make_context(data, trainer=TrainerConfig(epochs=1, batch_size=64, learning_rate=0.02))
    config = LsqConfig(latency_aware=True, calibration_samples=64, batch_norm_samples=64)
    assert names(function_of(config)(model, config, context)) == 2


def test_what_was_measured_before_a_kill_still_decides(
    model: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, {"stem.0", "head"}, [0.9, 0.8])
    config = StaticConfig(latency_aware=True, calibration_samples=64)

    def run() -> Model:
        return function_of(config)(model, config, make_context(data, workspace=tmp_path))

    assert names(run_through_kills(run, monkeypatch, saves=(1, 2))) == 2
    assert measured.asked == ["operators", "files"]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(torch.relu(self.down(nn.functional.adaptive_avg_pool2d(x, 1))))
        return x * nn.functional.hardsigmoid(gate)


class Inverted(nn.Module):
    """A block of MobileNetV3: wide, depthwise, gated, narrow."""

    def __init__(self, width: int, inside: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inside, 1, bias=False),
            nn.BatchNorm2d(inside),
            nn.Hardswish(),
            nn.Conv2d(inside, inside, kernel, padding=kernel // 2, groups=inside, bias=False),
            nn.BatchNorm2d(inside),
            nn.Hardswish(),
            SqueezeExcite(inside),
            nn.Conv2d(inside, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class MobileNetV3(nn.Module):
    """After Howard et al. 2019, Searching for MobileNetV3: what it is made of has no integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            Inverted(16, 64, 3),
            nn.Conv2d(16, 40, 3, 2, 1),
            nn.Hardswish(),
            Inverted(40, 120, 5),
        )
        self.head = nn.Sequential(nn.Linear(40, 256), nn.Hardswish(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits


@pytest.mark.slow
def test_a_net_that_integers_slow_down_is_never_slower() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 64, 64)
    split = TensorSplit((images, torch.zeros(64, dtype=torch.int64)))
    context: Context = make_context(Data(name="noise", train=split, val=split, test=split))
    model = Model.capture(MobileNetV3().eval(), (images[:2],))
    plain, careful = (StaticConfig(latency_aware=aware, observer="min_max") for aware in (False, True))
    result, everything = (function_of(config)(model, config, context) for config in (careful, plain))
    ours, all_of_it = latency_ratios([result, everything], model, context)
    assert ours < 1.03
    assert ours < 1.03 * all_of_it
    assert sum(op_name(node) == "quantize_affine" for node in calls(everything.graph)) > 0
