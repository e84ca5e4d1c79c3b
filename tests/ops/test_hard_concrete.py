"""Hard-concrete gates: the probability of being open in closed form, and gradients against autograd."""

from __future__ import annotations

import pytest
import torch

from mil_cli.ops.hard_concrete import HIGH, LOW, TEMPERATURE, hard_concrete, probability_open


@pytest.mark.parametrize("odds", [-4.0, -2.4, -1.0, 0.0, 3.0])
def test_the_share_of_open_gates_is_the_closed_form(odds: float) -> None:
    torch.manual_seed(0)
    log_odds = torch.full((200_000,), odds)
    gates = hard_concrete(log_odds, True)
    expected = float(probability_open(log_odds[:1].double()))
    assert float((gates > 0).double().mean()) == pytest.approx(expected, abs=4e-3)
    assert bool(((gates >= 0) & (gates <= 1)).all())


def test_afterwards_a_gate_is_the_stretched_sigmoid() -> None:
    log_odds = torch.tensor([-10.0, -2.39, 0.0, 10.0])
    expected = (log_odds.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(hard_concrete(log_odds, False), expected)
    assert hard_concrete(log_odds, False)[[0, 3]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("train", [True, False])
def test_the_gradient_is_that_of_the_formula(train: bool) -> None:
    start = torch.linspace(-4, 4, 400)
    log_odds = start.clone().requires_grad_(True)
    torch.manual_seed(1)
    gates = hard_concrete(log_odds, train)
    weights = torch.randn(400)
    (gates * weights).sum().backward()  # type: ignore[no-untyped-call]
    by_hand = start.clone().requires_grad_(True)
    torch.manual_seed(1)
    odds = (torch.rand(400).logit() + by_hand) / TEMPERATURE if train else by_hand
    formula = (odds.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
    (formula * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(gates, formula)
    torch.testing.assert_close(log_odds.grad, by_hand.grad, atol=1e-5, rtol=1e-3)


def test_the_operator_is_sound() -> None:
    torch.library.opcheck(hard_concrete, (torch.randn(5, requires_grad=True), False))
