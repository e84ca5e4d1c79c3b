"""Counting candidates of a search: cuts, and residual blocks that are left out, without making either."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import Counter, Coupling, analyse, cut, repair
from mil_cli.graph.coupling.record import record
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, module_stack
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit

IMAGES = (torch.zeros(2, 1, 28, 28),)


@pytest.fixture(scope="module")
def resnet() -> tuple[Model, Coupling, Counter]:
    model = Model.capture(resnet20(width=16, stem_stride=2).eval(), IMAGES)
    coupling = analyse(model)
    return model, coupling, Counter(coupling)


@pytest.fixture(scope="module")
def transformer() -> tuple[Model, Coupling, Counter]:
    model = Model.capture(vit(dim=48, depth=2).eval(), IMAGES)
    coupling = analyse(model)
    return model, coupling, Counter(coupling)


def nodes_in(coupling: Coupling, path: str) -> set[str]:
    """Return the names of the calls of one of the user's modules."""
    return {node.name for node in calls(coupling.graph) if any(inside == path for inside, _ in module_stack(node))}


def some_cut(coupling: Coupling, seed: int) -> dict[int, set[int]]:
    generator = random.Random(seed)
    share = generator.uniform(0.1, 0.9)
    return repair(
        coupling,
        {
            number: {label for label in space.free if generator.random() < share}
            for number, space in enumerate(coupling.spaces)
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(2, 3, 3), (3, 2, 3), (3, 3, 1)])
def test_left_out_blocks_count_as_in_a_net_built_without_them(
    resnet: tuple[Model, Coupling, Counter], blocks: tuple[int, ...]
) -> None:
    _, coupling, counter = resnet
    gone = [f"stages.{stage}.{block}" for stage, kept in enumerate(blocks) for block in range(kept, 3)]
    dropped = set().union(*(nodes_in(coupling, path) for path in gone))
    reduced = Model.capture(resnet20(width=16, stem_stride=2, blocks=blocks).eval(), IMAGES)
    assert counter.macs({}, dropped) == sum(counter.macs_by_node({}, dropped).values()) == reduced.macs()
    assert counter.params({}, dropped) == reduced.num_params()
    expected = Counter(analyse(reduced))
    found = [(call.inputs, call.outputs) for call in counter.running({}, dropped)]
    assert found == [(call.inputs, call.outputs) for call in expected.running({})]


def test_a_left_out_block_of_a_cut_net_counts_as_cut(resnet: tuple[Model, Coupling, Counter]) -> None:
    model, coupling, counter = resnet
    removed = some_cut(coupling, 1)
    dropped = nodes_in(coupling, "stages.1.2")
    narrow = cut(model, coupling, removed)
    of_narrow = Counter(analyse(narrow))
    assert counter.macs(removed, dropped) == of_narrow.macs({}, dropped) < counter.macs(removed)
    assert counter.params(removed, dropped) == of_narrow.params({}, dropped) < counter.params(removed)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_sizes_are_those_of_the_net_that_is_cut(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    model, coupling, counter = request.getfixturevalue(name)
    removed = some_cut(coupling, seed)
    narrow = cut(model, coupling, removed)
    args, kwargs = narrow.batch_input(1)
    shapes = record(narrow.graph, args, kwargs).shapes
    compared = 0
    for call in counter.running(removed):
        if call.node.name in shapes:
            assert call.outputs == (shapes[call.node.name],), call.node
            compared += 1
    assert compared > 20


class Shared(nn.Module):
    """Reads one weight twice, and another only after it was transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.turned = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.linear(x, self.shared)
        x = x + nn.functional.linear(x, self.shared)
        return x + x @ self.turned.t()


def test_a_shared_weight_is_gone_with_the_last_that_reads_it() -> None:
    counter = Counter(analyse(Model.capture(Shared().eval(), (torch.zeros(2, 6),))))
    names = [call.node.name for call in counter.running({})]
    assert not any(name.startswith("t") for name in names), "what depends on weights alone does not run"
    assert counter.params({}) == 72
    assert counter.params({}, {"linear", "add"}) == 72
    assert counter.params({}, {"linear", "add", "linear_1", "add_1"}) == 36
    assert counter.params({}, {"matmul", "add_2"}) == 36
    assert counter.macs({}, {"matmul", "add_2"}) == 72
