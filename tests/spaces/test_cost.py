"""Operations and parameters without building, against the count of the captured model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import Choice, CostCounter, DesignedSpace, Repeat
from tests.spaces.nets import conv_net, samples, transformer


def _small_nets() -> tuple[DesignedSpace, Tensor]:
    return DesignedSpace(small_nets()), torch.zeros(2, 1, 28, 28)


SPACES = {"conv_net": conv_net, "transformer": transformer, "small_nets": _small_nets}


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_a_built_module_is_captured_like_any_other_and_counts_are_its(
    make: Callable[[], tuple[DesignedSpace, Tensor]],
) -> None:
    space, x = make()
    counter = CostCounter(space, (x[:1],))
    (one,) = samples(space, 1, seed=8)
    built = space.build(one).eval()
    model = Model.capture(built, (x,))
    torch.testing.assert_close(model(x), built(x), rtol=0, atol=1e-5)
    assert model.spec.batch is not None
    assert counter.macs(one) == model.macs()
    assert counter.params(one) == model.num_params()


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_counts_are_those_of_torch_on_the_built_module(make: Callable[[], tuple[DesignedSpace, Tensor]]) -> None:
    space, x = make()
    counter = CostCounter(space, (x[:1],))
    counts = set()
    for one in [space.smallest, space.largest, *samples(space, 10)]:
        built = space.build(one).eval()
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
            built(x[:1])
        assert counter.macs(one) == flops.get_total_flops() / 2
        assert counter.params(one) == sum(parameter.numel() for parameter in built.parameters())
        counts.add(counter.macs(one))
    assert len(counts) >= 6


def test_what_is_remembered_changes_nothing() -> None:
    space, x = conv_net()
    used = CostCounter(space, (x[:1],))
    for one in samples(space, 100):
        used.macs(one)
    for one in samples(space, 10, seed=1):
        assert used.macs(one) == CostCounter(space, (x[:1],)).macs(one)


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    space = DesignedSpace(nn.Sequential(first, second, Choice({"skip": nn.Identity(), "layer": nn.Linear(3, 3)})))
    counter = CostCounter(space, (torch.zeros(1, 3),))
    assert counter.params(space.smallest) == 9 + 3 + 3
    assert counter.params(space.largest) == 9 + 3 + 3 + 12


def test_operators_that_do_not_fit_are_told() -> None:
    space = DesignedSpace(nn.Sequential(Choice({"wide": nn.Linear(3, 5), "fits": nn.Linear(3, 4)}), nn.Linear(4, 2)))
    counter = CostCounter(space, (torch.zeros(1, 3),))
    assert counter.macs(space.architecture({"0": "fits"})) == 12 + 8
    with pytest.raises(ModelError, match="does not run on the shapes"):
        counter.macs(space.architecture({"0": "wide"}))


class _Fails(nn.Module):
    def __init__(self, problem: Exception) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, x: Tensor) -> Tensor:
        raise self.problem


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (nn.BatchNorm3d(3), "expected 5D input"),
        (_Fails(IndexError("too many indices")), "too many indices"),
        (_Fails(AssertionError()), "AssertionError"),
    ],
)
def test_whatever_an_operator_raises_is_told(operator: nn.Module, words: str) -> None:
    space = DesignedSpace(nn.Sequential(Choice({"fails": operator, "fits": nn.Linear(3, 4)})))
    with pytest.raises(ModelError, match=words):
        CostCounter(space, (torch.zeros(1, 3),)).macs(space.architecture({"0": "fails"}))


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_work_has_all_operations_and_is_that_of_an_architecture_alone(
    make: Callable[[], tuple[DesignedSpace, Tensor]],
) -> None:
    space, x = make()
    used = CostCounter(space, (x[:1],))
    for one in [*samples(space, 20), *samples(space, 5)]:
        work = used.work(one)
        assert sum(count for kind, count in work.items() if kind.endswith(".macs")) == used.macs(one)
    for one in samples(space, 5):
        assert used.work(one) == CostCounter(space, (x[:1],)).work(one)


def test_work_counted_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 25, 3),
    )
    space = DesignedSpace(nn.Sequential(layers, Choice({"skip": nn.Identity(), "sigmoid": nn.Sigmoid()})))
    assert CostCounter(space, (torch.zeros(1, 2, 5, 5),)).work(space.architecture({"1": "sigmoid"})) == {
        **{"dense.macs": 25 * 2 * 6 * 9, "dense.elements": 25 * (2 + 6), "dense.calls": 1},
        **{"grouped.macs": 25 * 6 * 9, "grouped.elements": 25 * (6 + 6), "grouped.calls": 1},
        **{"pointwise.macs": 25 * 6 * 4, "pointwise.elements": 25 * (6 + 4), "pointwise.calls": 1},
        **{"product.macs": 300, "product.elements": 103, "product.calls": 1},
        **{"other.elements": 2 * 150 + 2 * 3, "other.calls": 2},
    }


def test_each_choice_runs_in_a_check() -> None:
    seen = []

    class Operator(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.bias.shape[0] + self.in_features)
            return super().forward(x)

    inner = Choice({"a": Operator(3, 3), "b": nn.Sequential(Operator(3, 4), Operator(4, 3))})
    choice = Choice({"large": nn.Linear(3, 3), "inner": nn.Sequential(Repeat([nn.Identity(), inner], 0))})
    space = DesignedSpace(nn.Sequential(choice))
    assert "0" in space.largest
    CostCounter(space, (torch.zeros(1, 3),)).check()
    assert set(seen) == {6, 7}
