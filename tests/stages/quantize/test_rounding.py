"""Soft roundings: where they start, what they pass on, and where the penalty pushes them."""

from __future__ import annotations

import pytest
import torch

from mil_cli.ops.quantize import quantize_affine
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.rounding import SoftRounding, exponent_at


def made(axis: int | None = 0) -> tuple[torch.Tensor, Quantizer, SoftRounding]:
    weight = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.1, 0.4, 6) if axis == 0 else torch.tensor(0.3)
    form = Quantizer(scale, torch.zeros(scale.shape, dtype=torch.int32), CodeRange(-4, 3), axis)
    return weight, form, SoftRounding(weight, form)


@pytest.mark.parametrize("axis", [0, None])
def test_it_starts_at_the_weight_itself_within_the_range(axis: int | None) -> None:
    weight, form, rounding = made(axis)
    steps = form.scale.reshape(-1, 1, 1)
    expected = weight.clamp(-4 * steps, 3 * steps)
    assert (weight != expected).any()  # some are clipped
    torch.testing.assert_close(rounding(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rounding.shares(), weight / steps - (weight / steps).floor(), rtol=0, atol=1e-6)


def test_decided_at_once_it_is_nearest_rounding() -> None:
    weight, form, rounding = made()
    expected = quantize_affine(weight, form.scale, form.zero_point, 0, -4, 3)
    assert torch.equal(rounding.decided(), expected)
    again = quantize_affine(rounding.decided(), form.scale, form.zero_point, 0, -4, 3)
    assert torch.equal(again, expected)  # it lies on its codes


def test_the_penalty_alone_decides_every_weight_for_the_nearer_code() -> None:
    _, _, rounding = made()
    nearest = rounding.decided()
    assert rounding.undecided() > 0
    optimizer = torch.optim.Adam([rounding.logits], lr=0.1)
    for _ in range(200):
        loss = rounding.penalty(2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rounding.undecided() == 0
    assert set(rounding.shares().unique().tolist()) == {0.0, 1.0}
    assert rounding.penalty(2.0).item() == 0.0
    assert torch.equal(rounding.decided(), nearest)
    assert torch.equal(rounding(), nearest)


def test_the_penalty_has_the_closed_form_and_its_gradient() -> None:
    _, _, rounding = made()
    shares = rounding.shares().detach()
    for exponent in (20.0, 2.0):
        expected = (1 - (2 * shares - 1).abs() ** exponent).sum()
        torch.testing.assert_close(rounding.penalty(exponent), expected)
    rounding.double()
    assert torch.autograd.gradcheck(lambda _: rounding.penalty(3.0), (rounding.logits,))


def test_the_exponent_falls_in_a_line_behind_the_warm_up() -> None:
    points = [exponent_at(done, warmup=0.2, start=20.0, end=2.0) for done in (0.0, 0.19, 0.2, 0.6, 1.0)]
    assert points[:2] == [None, None]
    assert points[2:] == pytest.approx([20.0, 11.0, 2.0])


def test_weights_of_0_stay_whatever_is_learned() -> None:
    weight, form, _ = made()
    weight[:, 1:] = 0
    rounding = SoftRounding(weight, form)
    with torch.no_grad():
        rounding.logits += 10.0
    for found in (rounding(), rounding.decided()):
        assert not found[:, 1:].any()
        assert (found[:, 0] >= weight[:, 0].minimum(3 * form.scale[:, None])).all()  # all went up
    assert rounding.undecided() == 0
