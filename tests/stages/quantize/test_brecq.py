"""BRECQ: blocks together, steps that learn, dropped quantization, errors by importance, kills, the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.models.vit import vit
from mil_cli.stages.quantize.brecq import BrecqConfig, quantize
from mil_cli.stages.quantize.soft_segment import kept_or_dropped
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.registry import config_type, function_of
from tests.stages.contexts import make_context, run_through_kills, trained_digits
from tests.stages.quantize.learned import context, make_model, quick, steps, weights


def config(**changes: Any) -> BrecqConfig:
    return BrecqConfig.model_validate(quick(**{"activation_bits": 4, "drop": 0.5, **changes}))


def static(**changes: Any) -> StaticConfig:
    shared = quick(activation_bits=4, bias_correction=False, **changes)
    return StaticConfig.model_validate({k: v for k, v in shared.items() if k in StaticConfig.model_fields})


def test_blocks_learn_together_and_weights_end_on_their_codes() -> None:
    used = context()
    learned = quantize(make_model(), config(), used)
    facts: Any = used.notes["units"]
    assert [unit["layers"] for unit in facts] == [("stem",), ("first", "second"), ("head",)]
    assert all(unit["kept"] and unit["learned"] < unit["nearest"] for unit in facts)
    assert len(weights(learned)) == 4
    for weight, scale in weights(learned).values():
        codes = weight / scale
        assert float((codes - codes.round()).abs().max()) < 1e-5
        assert set(codes.round().unique().tolist()) <= set(range(-4, 4))


def test_steps_learn_and_stay_positive_or_stay_as_they_were() -> None:
    model = make_model()
    before = steps(quantize_static(model, static(), context()))
    still = steps(quantize(model, config(step_rate=0.0), context()))
    assert still == before
    moved = steps(quantize(model, config(step_rate=0.003), context()))
    assert set(moved) == set(before)
    assert min(moved.values()) > 0
    changes = {name: abs(moved[name] / before[name] - 1) for name in before}
    # What the mean reads lies between the block and the layer behind the mean.
    assert [name for name, change in changes.items() if change < 1e-4] == ["quantizers.relu_2.scale"]
    assert max(changes.values()) < 60 * 0.003  # no more than Adam can go


@pytest.mark.slow
def test_nearly_all_is_saved_where_nearest_rounding_fails() -> None:
    model, data = trained_digits(), digits()
    bits = {"weight_bits": 2, "activation_bits": 4}
    settings = {
        **bits,
        "drop": 0.5,
        "iterations": 100,
        "learning_rate": 0.03,
        "samples": 256,
        "calibration_samples": 256,
    }
    used = make_context(data)
    plain = StaticConfig.model_validate({**bits, "bias_correction": False})
    nearest = used.evaluate(quantize_static(model, plain, used)).value
    learned = used.evaluate(quantize(model, BrecqConfig.model_validate(settings), used)).value
    assert nearest < 0.5
    assert learned > 0.9


def test_a_share_of_the_values_goes_unquantized() -> None:
    random = torch.Generator().manual_seed(0)
    mixed = kept_or_dropped(torch.zeros(100, 100), torch.ones(100, 100), 0.3, random)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert float(mixed.mean()) == pytest.approx(0.3, abs=0.02)
    again = kept_or_dropped(torch.zeros(100, 100), torch.ones(100, 100), 0.3, random)
    assert not torch.equal(mixed, again)
    assert kept_or_dropped(7, 9, 0.5, random) == 7


class HalfRead(nn.Module):
    """Of its hidden values the head reads the first half alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(torch.relu(self.stem(x)))[:, :4])
        return logits


def test_errors_that_the_loss_does_not_feel_do_not_count() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    split = TensorSplit((rows, labels))
    data = Data(name="rows", train=split, val=split, test=split)
    model = Model.capture(HalfRead().eval(), (torch.randn(2, 6),))
    nearest = weights(quantize_static(model, static(), context(data=data)))["hidden.weight"]
    codes = (nearest[0] / nearest[1]).round().clamp(-4, 3)

    def moved(fisher: bool) -> Tensor:
        settings = config(fisher=fisher, drop=0.0, step_rate=0.0)
        weight, scale = weights(quantize(model, settings, context(data=data)))["hidden.weight"]
        return ((weight / scale).round() != codes).sum(1)

    assert moved(True)[:4].sum() > 0
    assert moved(True)[4:].sum() == 0
    assert moved(False)[4:].sum() > 0


def test_a_transformer_comes_closer_than_by_nearest_rounding() -> None:
    torch.manual_seed(0)
    data = digits()
    model = Model.capture(vit(image_size=8, patch=4, dim=16, depth=1, heads=2).eval(), (torch.randn(2, 1, 8, 8),))
    used = make_context(data)
    learned = quantize(model, config(), used)
    facts: Any = used.notes["units"]
    assert sum(len(unit["layers"]) > 1 for unit in facts) == 2
    assert all(unit["learned"] <= unit["nearest"] for unit in facts)
    nearest = quantize_static(model, static(), used)
    images, _ = next(iter(data.val.batches(128)))

    def noise(quantized: Model) -> float:
        with torch.no_grad():
            return float((quantized(images) - model(images)).norm() / model(images).norm())

    assert noise(learned) < 0.9 * noise(nearest)


@pytest.mark.parametrize("fisher", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_and_resumed_is_bit_identical(fisher: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = make_model(), config(iterations=10, fisher=fisher)
    whole = quantize(model, settings, context(tmp_path / "whole"))
    resumed = run_through_kills(
        lambda: quantize(model, settings, context(tmp_path / "killed")), monkeypatch, saves=(1, 2)
    )
    assert resumed.fingerprint() == whole.fingerprint()


def test_the_file_gives_what_the_graph_gives(tmp_path: Path) -> None:
    used = context()
    learned = quantize(make_model(), config(weight_bits=4, first_last_bits=8), used)
    file = export_onnx(learned, tmp_path / "model.onnx", device=used.device).path
    (batch,) = used.data.val.batches(64)
    check_parity(learned, file, [used.task.inputs(batch)], threads=1)


def test_registered_and_settings_are_bounded() -> None:
    assert config_type("quantize", "brecq") is BrecqConfig
    assert function_of(BrecqConfig()) is quantize
    for name, value in (("drop", 1.0), ("step_rate", -1.0), ("fisher", "no idea")):
        with pytest.raises(ValidationError):
            BrecqConfig.model_validate({name: value})
