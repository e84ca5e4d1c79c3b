"""Residual branches: which are found, in which chains, and that leaving one out equals running without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.model import Model
from mil_cli.graph.residual import remove_branches, residual_chains
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import ResNet, resnet20
from mil_cli.models.vit import VisionTransformer, vit
from tests.graph.coupling.networks import NETWORKS


def captured(module: nn.Module, *shape: int) -> Model:
    torch.manual_seed(0)
    module.train()
    with torch.no_grad():
        module(torch.randn(8, *shape))
    return Model.capture(module.eval(), (torch.randn(2, *shape),))


def test_a_resnet_has_one_chain_a_stage() -> None:
    model = captured(resnet20(), 1, 16, 16)
    chains = residual_chains(model.graph)
    assert [len(chain) for chain in chains] == [3, 3, 3]
    assert all(branch.shortcut == branch.entry for chain in chains for branch in chain[1:])
    assert chains[1][0].shortcut != chains[1][0].entry  # the projection stays


def test_a_transformer_has_one_chain_of_attention_and_perceptron() -> None:
    model = captured(vit(depth=3, image_size=16), 1, 16, 16)
    (chain,) = residual_chains(model.graph)
    assert len(chain) == 6


@pytest.mark.slow
def test_blocks_that_change_the_shape_begin_a_chain_or_have_no_shortcut() -> None:
    model = captured(mobilenet(), 1, 16, 16)
    assert [len(chain) for chain in residual_chains(model.graph)] == [1, 1, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resnet_without_blocks_equals_the_module_without_them(stage: int) -> None:
    module = resnet20()
    model = captured(module, 1, 16, 16)
    chain = residual_chains(model.graph)[stage]
    remove_branches(model.graph, chain[1:])
    small: ResNet = copy.deepcopy(module)
    small.stages[stage] = small.stages[stage][:1]
    x = torch.randn(4, 1, 16, 16)
    assert torch.equal(model(x), small(x))
    assert model.num_params() == sum(parameter.numel() for parameter in small.parameters())
    assert len(list(model.parameters())) == len(list(small.parameters()))


@pytest.mark.slow
def test_a_projection_block_keeps_its_projection() -> None:
    module = resnet20()
    model = captured(module, 1, 16, 16)
    remove_branches(model.graph, residual_chains(model.graph)[1][:1])

    class Projection(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.shortcut = block.shortcut

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.shortcut(x))

    small = copy.deepcopy(module)
    small.stages[1][0] = Projection(small.stages[1][0])
    x = torch.randn(4, 1, 16, 16)
    assert torch.equal(model(x), small(x))


@pytest.mark.slow
def test_a_transformer_without_blocks_equals_the_module_without_them() -> None:
    module = vit(depth=4, image_size=16)
    model = captured(module, 1, 16, 16)
    (chain,) = residual_chains(model.graph)
    remove_branches(model.graph, chain[2:6])
    small: VisionTransformer = copy.deepcopy(module)
    small.blocks = nn.Sequential(small.blocks[0], small.blocks[3])
    x = torch.randn(4, 1, 16, 16)
    assert torch.equal(model(x), small(x))


@pytest.mark.parametrize(
    ("name", "lengths", "outer"),
    [("nested_residuals", [2, 2, 2], 1), ("a_branch_that_begins_with_a_branch", [1, 2, 1], 1)],
)
def test_branches_inside_a_branch_make_chains_of_their_own(name: str, lengths: list[int], outer: int) -> None:
    module, shape = NETWORKS[name]()
    model = Model.capture(module.eval(), (torch.randn(2, *shape),))
    chains = residual_chains(model.graph)
    assert [len(chain) for chain in chains] == lengths
    for number, chain in enumerate(chains):
        held = [any(big.holds(branch) for big in chains[outer]) for branch in chain]
        assert held == [number != outer] * len(chain)


class Odd(nn.Module):
    """Sums that are no residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.b(x)
        y = x + torch.relu(inner)  # something else reads inside
        z = self.a(x) + self.c(other)  # two branches of two inputs
        scaled = torch.add(y, self.d(y), alpha=2)
        return z + torch.tanh(z), scaled + inner  # no weight inside


def test_other_sums_are_left_alone() -> None:
    model = Model.capture(Odd().eval(), (torch.randn(2, 6), torch.randn(2, 6)))
    assert residual_chains(model.graph) == []


class InPlace(nn.Module):
    """What follows writes into the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return torch.relu_(x + self.b(x)), x  # without the branch relu_ would change what is returned beside it


def test_an_operator_in_place_must_not_write_into_the_shortcut() -> None:
    model = Model.capture(InPlace().eval(), (torch.randn(2, 6),))
    assert residual_chains(model.graph) == []


class FirstInPlace(nn.Module):
    """Without the branch the rectifier would write into what the caller gave."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x + self.b(x))


def test_an_operator_in_place_must_not_write_into_an_input() -> None:
    model = Model.capture(FirstInPlace().eval(), (torch.randn(2, 6),))
    assert residual_chains(model.graph) == []


class PreActivation(nn.Module):
    """The branch writes into what the shortcut carries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.relu_(x)) + x


def test_what_a_branch_wrote_into_the_shortcut_stays_written() -> None:
    module = PreActivation().eval()
    model = Model.capture(module, (torch.randn(2, 6),))
    ((branch,),) = residual_chains(model.graph)
    remove_branches(model.graph, [branch])
    x = torch.randn(4, 6)
    assert torch.equal(model(x), torch.relu(module.a(x)))
