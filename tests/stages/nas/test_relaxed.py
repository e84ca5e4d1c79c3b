"""Mixtures of operators: gradients of strengths, losses, what architecture they show, resuming, stopping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.models.cell_nets import cell_nets
from mil_cli.spaces import Choice, DesignedSpace, Node, Zero
from mil_cli.spaces.largest import largest
from mil_cli.stages.nas.relaxed import Mixture, Relaxation, drop_skips, endless, normalise_pools, relaxing, settle_norms
from mil_cli.stages.nas.strengths import Strengths, count_skips, derive, nodes_of, zero_one
from mil_cli.task.classification import Classification
from mil_cli.training.objective import Running
from tests.stages.nas.designed import space as small_nets_space


class Tiny(nn.Module):
    """A cell of two nodes between linear layers, for any precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.first, self.second = Node([_edge()]), Node([_edge(), _edge()])
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.stem(x)
        middle = self.first([start])
        return self.head(self.second([start, middle]))  # type: ignore[no-any-return]


def _edge() -> Choice:
    return Choice({"none": Zero(), "skip": nn.Identity(), "layer": nn.Sequential(nn.Linear(3, 3), nn.Tanh())})


EDGES = ("first.edges.0", "second.edges.0", "second.edges.1")


def tiny(seed: int = 0) -> DesignedSpace:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DesignedSpace(Tiny())


def split(samples: int = 12, seed: int = 0) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit((torch.randn(samples, 4, generator=generator), torch.arange(samples) % 2))


def strengths_of(space: DesignedSpace, **changes: Any) -> Strengths:
    settings: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.0, "apart": False, "edges": False, **changes}
    return Strengths(space, generator=torch.Generator().manual_seed(0), **settings)


def mixture_of(space: DesignedSpace) -> Mixture:
    x = torch.zeros(2, 4)
    return Mixture.beside(Model.capture(largest(space.module), (x,)), space)


def bound(
    mixture: Mixture, strengths: Strengths, relaxation: Relaxation, *, step: int = 0, **changes: Any
) -> tuple[Any, Any]:
    """Return the batch that strengths learn from in a step, and a training of the mixture at it."""
    settings: dict[str, Any] = {"batch_size": 4, "frozen": 0.0, "skip_dropout": 0.0, "seed": 1, **changes}
    running = Running(
        model=mixture,
        steps=lambda: step,
        total_steps=10,
        forward=lambda graph, *args, **kwargs: graph(*args, **kwargs),
        tapped=dict,
        device=torch.device("cpu"),
        channels_last=False,
    )
    objective = relaxing(Classification(), strengths, relaxation, split(), **settings)(running)
    return next(endless(split(), batch_size=4, seed=1, start=step)), objective


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("edges", [False, True])
def test_strengths_take_the_gradient_that_finite_differences_have(apart: bool, edges: bool) -> None:
    space = tiny()
    space.module.double()
    strengths = strengths_of(space, apart=apart, edges=edges).double()
    x, y = next(split().batches(8))

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        with space.mixed(weights):
            return nn.functional.cross_entropy(space.module(x.double()), y) + 3 * zero_one(weights)

    held = [strengths.alpha, strengths.beta]
    expected = []
    for number, one in enumerate(held):
        slopes = torch.zeros_like(one)
        for place in range(len(one)):
            values = []
            for change in (1e-6, -1e-6):
                moved = [other.clone() for other in held]
                moved[number][place] += change
                with torch.no_grad():
                    values.append(float(loss(strengths.weights(*moved))))
            slopes[place] = (values[0] - values[1]) / 2e-6
        expected.append(slopes)
    strengths._optimizer = torch.optim.SGD(held, lr=1.0)  # type: ignore[assignment]
    before = [one.clone() for one in held]
    strengths.step(loss)
    given = [old - new for old, new in zip(before, held, strict=True)]
    for slope, step in zip(expected, given, strict=True):
        torch.testing.assert_close(step, slope, rtol=1e-5, atol=1e-9)
    assert given[0].abs().max() > 1e-3
    assert len(given[1]) == (3 if edges else 0)


def test_strengths_learn_from_the_other_half_before_the_weights_do() -> None:
    space = tiny()
    mixture, strengths = mixture_of(space).train(), strengths_of(space)
    other_batch, _ = bound(mixture, strengths, Relaxation())
    by_hand = strengths_of(space)
    with torch.no_grad():
        by_hand.alpha.copy_(strengths.alpha)

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        with space.mixed(weights):
            return Classification().loss(space.module(other_batch[0]), other_batch)

    by_hand.step(loss)
    x = torch.randn(3, 4)
    given = mixture(x)
    torch.testing.assert_close(strengths.alpha, by_hand.alpha, rtol=0, atol=0)
    with space.mixed(by_hand.weights()):
        torch.testing.assert_close(given, space.module(x))
    given.sum().backward()
    assert all(weight.grad is not None for weight in space.module.parameters())


def test_frozen_strengths_and_evaluation_change_nothing() -> None:
    space = tiny()
    mixture, strengths = mixture_of(space), strengths_of(space)
    before = strengths.alpha.clone()
    bound(mixture.train(), strengths, Relaxation(), step=4, frozen=0.5)
    mixture(torch.randn(3, 4))
    bound(mixture.eval(), strengths, Relaxation(), step=6, frozen=0.5)
    mixture(torch.randn(3, 4))
    assert torch.equal(strengths.alpha, before)
    assert not strengths.updates
    mixture.train()(torch.randn(3, 4))
    assert not torch.equal(strengths.alpha, before)


def test_a_mixture_is_the_weighted_sum_by_hand() -> None:
    space = tiny()
    mixture, strengths = mixture_of(space).eval(), strengths_of(space)
    with torch.no_grad():
        strengths.alpha.copy_(torch.randn(9, generator=torch.Generator().manual_seed(3)))
    bound(mixture, strengths, Relaxation())
    x, module = torch.randn(5, 4), space.module

    def edge(number: int, value: torch.Tensor) -> torch.Tensor:
        three = strengths.alpha[3 * number : 3 * number + 3]
        _, skip, layer = (math.exp(one) / sum(map(math.exp, three.tolist())) for one in three.tolist())
        return skip * value + layer * module.get_submodule(f"{EDGES[number]}.layer")(value)  # type: ignore[no-any-return]

    start = module.get_submodule("stem")(x)
    expected = module.get_submodule("head")(edge(1, start) + edge(2, edge(0, start)))
    torch.testing.assert_close(mixture(x), expected)


def test_even_edges_and_all_channels_make_pc_darts_the_mean_of_what_darts_adds_up() -> None:
    space = tiny()
    with_edges, without = strengths_of(space, edges=True), strengths_of(space)
    with torch.no_grad():
        with_edges.beta.zero_()
    assert nodes_of(space) == [EDGES[:1], EDGES[1:]]
    inputs = [torch.randn(5, 3), torch.randn(5, 3)]
    for name, count in (("first", 1), ("second", 2)):
        node = space.module.get_submodule(name)
        with space.mixed(without.weights()):
            darts = node(inputs[:count])
        with space.mixed(with_edges.weights(), share=1):
            torch.testing.assert_close(count * node(inputs[:count]), darts)


def test_one_share_of_the_channels_is_all_of_them() -> None:
    torch.manual_seed(0)
    space, x = DesignedSpace(cell_nets(widths=(8,), cells=(1,))), torch.randn(2, 8, 6, 6)
    choice = space.module.get_submodule("cells.0.nodes.1.edges.0")
    with space.mixed(strengths_of(space).weights()):
        torch.testing.assert_close(choice._mixed_partly(choice.width, x), choice(x))  # type: ignore[operator]


def test_the_zero_one_loss_by_hand() -> None:
    value = zero_one({"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([0.0, 0.75])})
    assert float(value) == pytest.approx(-(0 + 0.25 + 0.25 + 0.0625) / 4)
    alpha = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    zero_one({"a": alpha.sigmoid()}).backward()  # type: ignore[no-untyped-call]
    sigma = alpha.detach().sigmoid()
    torch.testing.assert_close(alpha.grad, -2 / 3 * (sigma - 0.5) * sigma * (1 - sigma))


def test_the_architecture_of_some_weights() -> None:
    space = tiny()
    weights = {
        "first.edges.0": torch.tensor([0.8, 0.15, 0.05]),  # none is no operator to choose
        "second.edges.0": torch.tensor([0.1, 0.2, 0.7]),
        "second.edges.1": torch.tensor([0.0, 0.6, 0.4]),
    }
    whole = dict(zip(EDGES, ("skip", "layer", "skip"), strict=True))
    assert derive(space, weights, edges=None).to_json() == whole
    assert derive(space, weights, edges=1).to_json() == {**whole, "second.edges.1": "none"}
    assert derive(space, weights, edges=2, threshold=0.65).to_json() == {**whole, "second.edges.1": "none"}
    assert derive(space, weights, edges=2, threshold=0.9).to_json() == {**whole, "second.edges.1": "none"}
    assert count_skips(space, derive(space, weights, edges=None)) == 2
    assert count_skips(space, derive(space, weights, edges=1)) == 1


def test_what_is_not_between_operators_is_as_large_as_it_can_be() -> None:
    space = small_nets_space()
    strengths = strengths_of(space)
    found = derive(space, strengths.weights(), edges=2)
    for name, size in space.largest.items():
        if isinstance(size, int) and name in found:
            assert found[name] == size


def test_skips_are_dropped_less_and_less() -> None:
    space, rate = tiny(), 0.5
    drop_skips(space, lambda: rate)
    skip = space.module.get_submodule("first.edges.0.skip").train()
    x = torch.ones(10_000)
    kept = skip(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    rate = 0.0
    assert torch.equal(skip(x), x)
    rate = 0.5
    assert torch.equal(skip.eval()(x), x)


def test_norms_in_operators_do_not_rescale() -> None:
    space = DesignedSpace(cell_nets(widths=(4, 8)))
    settle_norms(space)
    fixed = {name for name, weight in space.module.named_parameters() if not weight.requires_grad}
    norms = {
        f"{name}.{part}"
        for name, module in space.module.named_modules()
        if isinstance(module, nn.BatchNorm2d) and ".edges." in name
        for part in ("weight", "bias")
    }
    assert fixed == norms
    assert norms


def test_pooling_gives_mean_0_and_variance_1_in_copies_too() -> None:
    space = DesignedSpace(cell_nets(widths=(4, 4), stem_stride=1))
    normalise_pools(space)
    x = 3 + 5 * torch.randn(16, 4, 8, 8)
    edge = space.module.cells[0].nodes[0].edges[0]
    for name in ("mean", "max"):
        pooled = edge.get_submodule(name)(x)
        torch.testing.assert_close(pooled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(pooled.var((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)
    copied = Mixture.beside(Model.capture(largest(space.module), (torch.zeros(2, 1, 8, 8),)), space).clone().space
    torch.testing.assert_close(copied.module.cells[1].nodes[0].edges[0].get_submodule("max")(x).mean(), torch.zeros(()))


def test_batches_go_on_where_they_were() -> None:
    first = endless(split(10), batch_size=4, seed=2, start=0)
    five = [next(first) for _ in range(5)]
    later = endless(split(10), batch_size=4, seed=2, start=3)
    for given, expected in zip([next(later) for _ in range(2)], five[3:], strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert not torch.equal(five[0][0], five[2][0])  # another pass has another order
