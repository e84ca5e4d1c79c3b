"""What all training with quantizers shares: falling numbers of bits, and damping."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_argument, get_attribute
from mil_cli.stages.quantize.aware import place_unfolded
from mil_cli.stages.quantize.damping import dampen
from mil_cli.stages.quantize.dorefa import DorefaConfig
from mil_cli.stages.quantize.dorefa import quantize as dorefa
from mil_cli.stages.quantize.lsq import LsqConfig, quantize
from mil_cli.stages.quantize.settings import Rules
from tests.stages.contexts import run_through_kills
from tests.stages.quantize.striped import codes, context, quantizers


def phases(data: Data, **settings: object) -> list[tuple[int, int]]:
    config = LsqConfig.model_validate(settings)
    rules = Rules.of(config, context(data))
    return [(phase.weight_bits, phase.activation_bits) for _, phase in config.phases(rules)]


def test_bits_fall_to_those_asked_for(data: Data) -> None:
    low = {"weight_bits": 2, "activation_bits": 4}
    assert phases(data, **low) == [(2, 4)]
    assert phases(data, **low, bits_schedule=(8, 4, 3)) == [(8, 8), (4, 4), (3, 4), (2, 4)]
    assert phases(data, **low, bits_schedule=(6, 2)) == [(6, 6), (2, 4)]
    assert phases(data, bits_schedule=(8, 4)) == [(8, 8)]
    single = {"layers": {"body.*": {"weight_bits": 2}}}
    config = LsqConfig.model_validate({**single, "bits_schedule": (6, 4)})
    found = [phase.layers["body.*"].weight_bits for _, phase in config.phases(Rules.of(config, context(data)))]
    assert found == [6, 4, 2]
    for wrong in ((4, 8), (4, 4), (9,), (1,)):
        with pytest.raises(ValidationError, match="bits_schedule"):
            LsqConfig(bits_schedule=wrong)


@pytest.mark.slow
def test_a_schedule_that_is_killed_goes_on_in_its_phase(
    model: Model, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LsqConfig(
        weight_bits=2,
        activation_bits=4,
        bits_schedule=(8, 3),
        batch_norm_samples=128,
        damping=1e-3,
        trainer={"epochs": 1, "checkpoint_every_seconds": 0},
    )
    used = context(data, workspace=tmp_path / "whole")
    whole = quantize(model, settings, used)
    before = used.notes["bits_before"]
    assert [phase["bits"] for phase in before] == [8, 3]  # type: ignore[attr-defined]
    assert all(len(phase["history"]) == 1 for phase in before)  # type: ignore[attr-defined]
    # Each phase saves 8 times: the kills are in the first, in the second, and in the last.
    resumed = run_through_kills(
        lambda: quantize(model, settings, context(data, workspace=tmp_path / "killed")), monkeypatch, saves=(3, 12, 21)
    )
    assert resumed.fingerprint() == whole.fingerprint()
    plain = quantize(model, settings.model_copy(update={"bits_schedule": ()}), context(data))
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert int(codes(whole)["body.0.weight"].min()) == -2
    assert plain.fingerprint() != whole.fingerprint()


def gradients(training: Model, strength: float, step: int) -> dict[str, Tensor]:
    for parameter in training.parameters():
        parameter.grad = torch.zeros_like(parameter)
    dampen(strength)(training, step, 101)
    return {name: value.grad for name, value in training.named_parameters() if value.grad is not None}


def test_damping_is_the_gradient_of_the_papers_loss(model: Model, data: Data, inserted: dict[str, Model]) -> None:
    quantize(model, LsqConfig(weight_bits=2, activation_bits=4, trainer={"epochs": 1}), context(data))
    training = inserted["start"]
    weight = dict(training.named_parameters())["body.0.weight"]
    with torch.no_grad():
        weight[0, 0, 0, 0] = 100.0  # clipped: nothing draws it
    scale = get_attribute(training.graph, "quantizers.body_0_weight.scale").detach().reshape(-1, 1, 1, 1)

    def total(values: Tensor) -> Tensor:
        held = (weight.detach() / scale).round().clamp(-2, 1) * scale
        return (held - torch.minimum(torch.maximum(values, -2 * scale), scale)).square().sum()

    values = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(total(values), values)
    for step in (0, 30, 100):
        strength = 0.5 * (1 - math.cos(math.pi * step / 100)) / 2
        found = gradients(training, 0.5, step)
        torch.testing.assert_close(found["body.0.weight"].double(), strength * expected, rtol=1e-4, atol=1e-6)
        assert not any(bool(value.any()) for name, value in found.items() if name.startswith("quantizers"))


def test_damping_reaches_through_what_weights_are_computed_by(
    model: Model, data: Data, inserted: dict[str, Model]
) -> None:
    dorefa(model, DorefaConfig(weight_bits=3, trainer={"epochs": 1}), context(data))
    training = inserted["start"].clone()
    weight, before = (dict(net.named_parameters())["body.0.weight"] for net in (training, inserted["start"].clone()))
    found = gradients(training, 0.5, 100)["body.0.weight"]
    size = get_attribute(training.graph, "quantizers.body_0_weight.size").double()

    def loss(values: Tensor, rounded: Tensor | None = None) -> Tensor:
        tangent = values.tanh()
        bounded = tangent / tangent.abs().amax((1, 2, 3), keepdim=True)
        held = (2 * ((bounded / 2 + 0.5) * 7).round() / 7 - 1) if rounded is None else rounded
        return held if rounded is None else 0.5 * ((bounded - held) * size).square().sum()

    values = weight.detach().double()
    held, place, small = loss(values), (1, 2, 0, 1), 1e-5
    sides = []
    for way in (1, -1):
        moved = values.clone()
        moved[place] += way * small
        sides.append(float(loss(moved, held)))
    assert float(found[place]) == pytest.approx((sides[0] - sides[1]) / (2 * small), rel=1e-3)
    assert torch.equal(weight, before)


def distance(model: Model) -> float:
    """How far inner weights are from what they round to, in steps, on average."""
    totals = []
    for node in quantizers(model):
        if str(get_argument(node, "x").target) == "body.0.weight":
            weight, scale = (get_attribute(model.graph, str(source.target)).detach() for source in node.args[:2])
            steps = (weight / scale.reshape(-1, 1, 1, 1)).clamp(node.args[-2], node.args[-1])
            totals.append(float((steps - steps.round()).abs().mean()))
    (found,) = totals
    return found


def test_damped_weights_end_near_what_they_round_to(model: Model, data: Data) -> None:
    low = {"weight_bits": 3, "activation_bits": 4, "batch_norm_samples": 128, "trainer": {"epochs": 2}}
    free, damped = (
        quantize(model, LsqConfig.model_validate({**low, "damping": strength}), context(data))
        for strength in (0.0, 3.0)
    )
    assert distance(damped) < 0.6 * distance(free)


def test_a_layer_reads_what_comes_out_of_all_norms_that_are_folded() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    placement = place_unfolded(Model.capture(net, (torch.randn(2, 1, 8, 8),)), policy="cnn", skip=(), narrow=None)
    assert [layer.source for layer in placement.layers] == [layer.node.args[0] for layer in placement.layers]
