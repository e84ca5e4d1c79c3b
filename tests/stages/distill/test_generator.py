"""The generator's outputs have the shape and the range asked for; the bank keeps what came last."""

from __future__ import annotations

import pytest
import torch

from mil_cli.stages.distill.generator import Bank, Generator

SHAPES = [(5,), (3, 17), (1, 28, 28), (2, 8, 9), (3, 33, 20), (1, 3, 4, 5), (4, 1)]


def _make(shape: tuple[int, ...], span: tuple[float, float] | None, *, classes: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    generator = Generator(shape, classes=classes, noise=6, width=4, span=span)
    with torch.no_grad():
        generator.end.weight.mul_(20)  # type: ignore[operator]
    return generator(torch.randn(32, 6), torch.arange(32) % 4).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_have_the_models_shape_and_lie_in_the_range(shape: tuple[int, ...]) -> None:
    made = _make(shape, (-0.5, 2.0))
    assert made.shape == (32, *shape)
    assert float(made.min()) >= -0.5
    assert float(made.max()) <= 2.0
    assert float(made.max() - made.min()) > 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_range_each_channel_is_standard(shape: tuple[int, ...]) -> None:
    channels = _make(shape, None).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(shape[0]), atol=0.05, rtol=0)


def test_the_class_asked_for_matters_only_where_it_is_told() -> None:
    for classes in (4, 0):
        torch.manual_seed(0)
        generator = Generator((1, 8, 8), classes=classes, noise=6, width=4, span=None).eval()
        noise = torch.randn(3, 6)
        first, other = (generator(noise, torch.full((3,), label)) for label in (0, 3))
        assert torch.equal(first, other) == (classes == 0)


def test_the_bank_keeps_the_last_ones_and_no_more() -> None:
    bank = Bank((2,), capacity=5)
    bank.add(torch.zeros(2, 2))
    assert len(bank) == 2
    for value in (1.0, 2.0, 3.0):
        bank.add(torch.full((2, 2), value))
    assert len(bank) == 5
    assert sorted(bank.images[:, 0].tolist()) == [1.0, 2.0, 2.0, 3.0, 3.0]
    drawn = [bank.draw(6, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].flatten().tolist()) <= {1.0, 2.0, 3.0}


def test_more_than_the_bank_holds_leaves_the_last_of_it() -> None:
    bank = Bank((1,), capacity=3)
    bank.add(torch.arange(8.0).unsqueeze(1))
    assert sorted(bank.images[:, 0].tolist()) == [5.0, 6.0, 7.0]
    other = Bank((1,), capacity=3)
    other.load_state_dict(bank.state_dict())
    other.add(torch.tensor([[9.0]]))
    assert sorted(other.images[:, 0].tolist()) == [6.0, 7.0, 9.0]
