"""Operators, depths and mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.spaces import Choice, DesignedSpace, Repeat, Width, Zero


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_the_first_blocks_run_one_after_another() -> None:
    repeat = Repeat(lambda index: Scale(index + 2.0), least=0, most=3)
    given = []
    with torch.no_grad():
        for repeat.chosen in range(4):
            given.append(float(repeat(torch.ones(()))))
    assert given == [1, 2, 6, 24]


def test_a_block_named_twice_runs_twice() -> None:
    block = Scale(3.0)
    with torch.no_grad():
        assert float(Repeat([block, block], least=1)(torch.ones(()))) == 9


def test_operators_are_mixed_by_weights_that_gradients_reach() -> None:
    module = nn.Sequential(Choice({"twice": Scale(2.0), "five": Scale(5.0), "none": Zero()}))
    space = DesignedSpace(module)
    weights = torch.tensor([0.5, 0.2, 0.3], requires_grad=True)
    x = torch.tensor([1.0, -1.0])
    with space.mixed({"0": weights}):
        y = module(x)
    torch.testing.assert_close(y, 2.0 * x)
    y[0].backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [2.0, 5.0, 0.0]
    torch.testing.assert_close(module(x), 2 * x)  # the first operator again
    assert dict(module.named_parameters()).keys() == {"0.twice.factor", "0.five.factor"}


def test_mixtures_of_what_there_is_not_are_told() -> None:
    space = DesignedSpace(nn.ModuleDict({"mixer": Choice({"a": Zero(), "b": Zero()})}))
    with pytest.raises(ModelError, match="did you mean 'mixer'"), space.mixed({"mixr": torch.ones(2)}):
        pass
    with pytest.raises(ModelError, match="each of its 2 operators"), space.mixed({"mixer": torch.ones(3)}):
        pass


def test_zero_has_the_shape_of_a_padded_convolution() -> None:
    x = torch.randn(2, 3, 7, 8)
    like = nn.Conv2d(3, 3, 3, stride=2, padding=1)(x)
    assert Zero(stride=2)(x).shape == like.shape
    assert not Zero()(torch.full((2,), torch.inf)).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Choice({}), "needs a mapping"),
        (lambda: Choice([nn.Identity()]), "needs a mapping"),  # type: ignore[arg-type]
        (lambda: Choice({"a": 3}), "'a' must be a module"),  # type: ignore[dict-item]
        (lambda: Choice({"a.b": nn.Identity()}), "without a dot"),
        (lambda: Choice({"forward": nn.Identity()}), "cannot have this name .got 'forward'"),
        (lambda: Repeat(nn.ReLU(), least=1, most=2), "a function of the block's index"),  # type: ignore[arg-type]
        (lambda: Repeat(lambda index: nn.ReLU(), least=1), "Repeat.most: must be a whole number"),
        (lambda: Repeat([nn.ReLU()], least=2), "from 0 to 1"),
        (lambda: Repeat([nn.ReLU()], least=0, most=2), "there are 1 blocks"),
        (lambda: Repeat([], least=0), "at least one block"),
        (lambda: DesignedSpace(nn.Linear(2, 2)), "nothing to choose from"),
        (lambda: Repeat([Width([1])], least=1), "a block must be a module"),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_is_told(make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()
