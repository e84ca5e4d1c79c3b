"""Plain modules: what they compute, what is left in them, how they are initialised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import Choice, CostCounter, DesignedSpace, Linear, Width
from mil_cli.spaces.plain import Searchable
from tests.spaces.nets import conv_net, samples, transformer


def _small_nets() -> tuple[DesignedSpace, Tensor]:
    torch.manual_seed(0)
    return DesignedSpace(small_nets()), torch.randn(2, 1, 28, 28)


SPACES = {"conv_net": conv_net, "transformer": transformer, "small_nets": _small_nets}


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_a_built_module_computes_what_the_shared_one_does(make: Callable[[], tuple[DesignedSpace, Tensor]]) -> None:
    space, x = make()
    space.module.eval()
    for one in [space.smallest, space.largest, *samples(space, 25)]:
        built = space.build(one, inherit=True)
        assert not built.training
        with torch.no_grad(), space.active(one):
            torch.testing.assert_close(built(x), space.module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_nothing_to_choose_is_left_and_nothing_is_shared(make: Callable[[], tuple[DesignedSpace, Tensor]]) -> None:
    space, _ = make()
    shared = {tensor.data_ptr() for tensor in space.module.state_dict().values()}
    for one in samples(space, 5):
        built = space.build(one, inherit=True)
        for module in built.modules():
            assert not isinstance(module, Searchable)
            assert not any(isinstance(value, Searchable) for value in module.__dict__.values())
        assert not shared & {tensor.data_ptr() for tensor in built.state_dict().values()}


def test_fresh_weights_are_those_of_layers_made_by_hand() -> None:
    space, _ = transformer()
    choices = {"embed.out_features": 8, "blocks": 1, "blocks.0.attention.heads": 2, "blocks.0.hidden": 12}
    built = space.build(space.architecture(choices), seed=7)
    torch.manual_seed(7)
    layers = {
        "embed": nn.Linear(6, 8),
        "blocks.0.norm": nn.LayerNorm(8),
        "blocks.0.attention.qkv": nn.Linear(8, 24),
        "blocks.0.attention.out": nn.Linear(8, 8),
        "blocks.0.mlp.0": nn.LayerNorm(8),
        "blocks.0.mlp.1": nn.Linear(8, 12),
        "blocks.0.mlp.3": nn.Linear(12, 8),
        "head": nn.Linear(8, 3),
    }
    expected = {f"{path}.{name}": value for path, layer in layers.items() for name, value in layer.state_dict().items()}
    assert built.state_dict().keys() == expected.keys()
    for name, value in built.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_fresh_weights_follow_from_the_seed_alone() -> None:
    space, x = conv_net()
    one = space.largest
    state = torch.get_rng_state()
    first = space.build(one, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    with space.active(one):
        space.module(x)  # moves running statistics
    nn.init.zeros_(space.module.get_parameter("head.weight"))
    second, other = space.build(one, seed=1).state_dict(), space.build(one, seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.layer = Linear(4, Width([2, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.token)  # type: ignore[no-any-return]


class _Drawn(_Own):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.token)
        nn.init.zeros_(self.layer.weight)


def test_weights_of_a_users_own_class_are_drawn_by_its_method() -> None:
    with pytest.raises(ModelError, match=r"a method reset_parameters\(self\)"):
        DesignedSpace(_Own()).build(DesignedSpace(_Own()).largest)
    space = DesignedSpace(_Drawn())
    built = space.build(space.largest)
    assert built.get_parameter("token").tolist() == [1.0] * 4
    assert not built.get_parameter("layer.weight").any()  # the whole comes after its parts


def test_attention_of_torch_is_initialised_too() -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "op": Choice({"a": nn.Linear(4, 4)})})
    space = DesignedSpace(net)
    built = space.build(space.largest, seed=3)
    torch.manual_seed(3)
    expected = nn.MultiheadAttention(4, 2)
    torch.testing.assert_close(built["attention"].in_proj_weight, expected.in_proj_weight)  # type: ignore[index]


def test_frozen_weights_stay_frozen() -> None:
    space, _ = transformer()
    space.module.get_parameter("embed.weight").requires_grad_(False)
    built = space.build(space.smallest, inherit=True)
    trained = {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
    assert trained == {"embed.weight"}


def test_tied_weights_stay_tied() -> None:
    width = Width([2, 3])
    first, second = Linear(width, 4, bias=False), Linear(width, 4, bias=False)
    second.weight = first.weight
    net = nn.ModuleDict({"first": first, "second": second, "third": Linear(width, 4, bias=False)})
    built = DesignedSpace(net).build(DesignedSpace(net).smallest, inherit=True)
    assert {name for name, _ in built.named_parameters()} == {"first.weight", "third.weight"}
    assert built.get_parameter("second.weight") is built.get_parameter("first.weight")


@pytest.mark.parametrize("first", ["table", "head"])
def test_weights_stay_tied_to_those_of_layers_of_torch(first: str) -> None:
    width = Width([2, 4])
    table, head = nn.Embedding(5, 3), Linear(3, 5, bias=False)
    head.weight = table.weight
    ends = {"table": table, "head": head} if first == "table" else {"head": head, "table": table}
    space = DesignedSpace(nn.ModuleDict({**ends, "inner": nn.Sequential(Linear(3, width), Linear(width, 3))}))
    built = space.build(space.smallest, inherit=True)
    assert built["head"].weight is built["table"].weight
    assert built["head"].weight is not head.weight
    torch.testing.assert_close(built["head"].weight, head.weight)
    count = CostCounter(space, ()).params(space.smallest)
    assert sum(parameter.numel() for parameter in built.parameters()) == count
