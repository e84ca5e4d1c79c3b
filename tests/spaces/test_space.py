"""Architectures of a space: which decisions act, drawing, breeding, reading, encoding, running on shared weights."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.spaces import Choice, Conv2d, DesignedSpace, Kernel, Linear, Repeat, Width
from tests.spaces.nets import conv_net, samples, transformer


def test_decisions_are_named_by_where_they_stand() -> None:
    space, _ = conv_net()
    choices = {decision.name: decision.choices for decision in space.decisions}
    assert choices["width"] == (4, 8)
    assert choices["blocks"] == (0, 1, 2)
    assert choices["blocks.1"] == ("conv", "inverted", "skip", "none")
    assert choices["blocks.1.inverted.expansion"] == (1, 2)
    assert len(choices) == 2 + 2 * 3
    assert space.size == 2 * 3 * (4 * 2 * 2) ** 2
    unnamed = DesignedSpace(nn.Sequential(nn.Linear(3, 4), Linear(4, Width([1, 2]) * Width([2, 3]))))
    assert [decision.name for decision in unnamed.decisions] == ["1.out_features", "1.out_features.2"]


def test_only_what_acts_is_in_an_architecture() -> None:
    space, _ = conv_net()
    full = {"width": 8, "blocks": 1, "blocks.0": "skip", "blocks.0.inverted.kernel": 5, "blocks.1": "conv"}
    assert space.architecture(full) == {"width": 8, "blocks": 1, "blocks.0": "skip"}
    assert space.architecture({"blocks": 0, "width": 4}) == {"width": 4, "blocks": 0}
    inverted = {"width": 4, "blocks": 1, "blocks.0": "inverted"}
    inner = {"blocks.0.inverted.expansion": 2, "blocks.0.inverted.kernel": 3}
    assert space.architecture({**inverted, **inner}) == {**inverted, **inner}
    with pytest.raises(ModelError, match="choice of this decision is missing"):
        space.architecture(inverted)


def test_a_number_acts_where_any_of_its_layers_does() -> None:
    hidden = Width([2, 3])
    first = Choice({"mlp": nn.Sequential(Linear(4, hidden), Linear(hidden, 4)), "skip": nn.Identity()})
    second = Choice({"mlp": nn.Sequential(Linear(4, hidden), Linear(hidden, 4)), "skip": nn.Identity()})
    space = DesignedSpace(nn.Sequential(first, second))
    name = "0.mlp.0.out_features"
    for one, other in (("mlp", "skip"), ("skip", "mlp"), ("mlp", "mlp")):
        assert space.architecture({"0": one, "1": other, name: 2})[name] == 2
    assert space.architecture({"0": "skip", "1": "skip", name: 2}) == {"0": "skip", "1": "skip"}


def test_architectures_go_through_json_and_are_told_apart() -> None:
    space, _ = transformer()
    for one in samples(space, 20):
        again = space.architecture(json.loads(json.dumps(one.to_json())))
        assert again == one
        assert hash(again) == hash(one)
        assert list(again) == list(one)
        assert space.at(space.indices(one)) == one
    assert len(set(samples(space, 20))) > 10
    smallest = {"embed.out_features": 8, "blocks": 1, "blocks.0.attention.heads": 1, "blocks.0.hidden": 8}
    assert space.smallest == smallest
    assert str(space.smallest) == "embed.out_features=8 blocks=1 blocks.0.attention.heads=1 blocks.0.hidden=8"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"widht": 8}, "did you mean 'width'"),
        ({"width": 9, "blocks": 0}, "width: no such choice .got 9"),
        ({"width": True, "blocks": 0}, "no such choice"),
        ({"width": "8", "blocks": 0}, "no such choice"),
        ({"width": 8, "blocks": 1, "blocks.0": "convv"}, "did you mean 'conv'"),
        ({"width": 8}, "blocks: the choice of this decision is missing"),
        ([], "is an object"),
    ],
)
def test_foreign_choices_are_checked(content: object, words: str) -> None:
    space, _ = conv_net()
    with pytest.raises(ModelError, match=words):
        space.architecture(content)  # type: ignore[arg-type]


def test_an_architecture_of_another_space_is_refused() -> None:
    space, _ = conv_net()
    other, _ = transformer()
    with pytest.raises(ModelError, match="another space"):
        space.build(other.smallest)


def test_each_decision_that_acts_is_drawn_evenly() -> None:
    space, _ = conv_net()
    drawn = samples(space, 3000)
    for name, among in (("width", drawn), ("blocks", drawn), ("blocks.0", [a for a in drawn if "blocks.0" in a])):
        counts = Counter(one[name] for one in among)
        expected = len(among) / len(counts)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert chi_square < 16.3  # the 0.999 quantile of 3 degrees of freedom
    assert samples(space, 5) == samples(space, 5) != samples(space, 5, seed=1)


def test_a_mutation_changes_something_and_keeps_the_rest() -> None:
    space, _ = conv_net()
    generator = torch.Generator().manual_seed(0)
    for one in samples(space, 50):
        child = space.mutate(one, generator, probability=0.0)
        assert space.architecture(child) == child != one
        # One decision moved; others differ only because they came to act or ceased to.
        assert sum(one[name] != child[name] for name in one.keys() & child.keys()) == 1


def test_a_crossing_has_every_choice_from_a_parent() -> None:
    space, _ = transformer()
    generator = torch.Generator().manual_seed(0)
    first, second = space.smallest, space.largest
    children = {space.cross(first, second, generator) for _ in range(50)}
    assert len(children) > 10
    for child in children:
        assert space.architecture(child) == child
        assert all(child[name] in (first.get(name), second.get(name)) for name in child)
    assert space.cross(first, first, generator) == first


def test_an_encoding_has_one_place_for_each_choice() -> None:
    space, _ = conv_net()
    for one in samples(space, 10):
        code = space.encode(one)
        assert code.dtype == np.float32
        assert len(code) == len(space.encoding_names)
        named = {name for name, value in zip(space.encoding_names, code, strict=True) if value}
        assert named == {f"{name}={choice}" for name, choice in one.items()}


def test_gradients_reach_only_what_runs() -> None:
    space, x = conv_net()
    one = space.architecture({"width": 4, "blocks": 1, "blocks.0": "conv"})
    with space.active(one):
        space.module(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in space.module.named_parameters()}
    assert {name for name in gradients if name.startswith("blocks") and gradients[name] is not None} == {
        "blocks.0.conv.0.weight",
        "blocks.0.conv.0.bias",
    }
    weight = gradients["blocks.0.conv.0.weight"]
    assert weight is not None
    assert weight[:4, :4].abs().sum() > 0
    assert not weight[4:].any()
    assert not weight[:, 4:].any()


def test_what_was_active_before_is_active_after() -> None:
    space, x = conv_net()
    space.module.eval()
    before = space.module(x)
    with space.active(space.smallest):
        inside = space.module(x)
        with space.active(space.largest):
            assert space.module(x).shape == inside.shape
        torch.testing.assert_close(space.module(x), inside, rtol=0, atol=0)
    with pytest.raises(RuntimeError), space.active(space.largest):
        space.module(x[:, :, 0, 0])
    torch.testing.assert_close(space.module(x), before, rtol=0, atol=0)


def test_a_part_that_stands_in_two_places_is_one_decision() -> None:
    block = Choice({"wide": Conv2d(2, 2, 3, padding=1), "skip": nn.Identity()})
    space = DesignedSpace(nn.Sequential(Repeat([nn.ReLU(), nn.Sequential(block)], least=1), block))
    assert [decision.name for decision in space.decisions] == ["0", "0.1.0"]
    assert space.architecture({"0": 1, "0.1.0": "wide"}) == {"0": 1, "0.1.0": "wide"}


def test_maps_of_kernels_make_no_operator_larger() -> None:
    kernel = Kernel([3, 5, 7], transformed=True)
    depthwise = Conv2d(8, 8, kernel, padding=kernel // 2, groups=8)  # 392 weights, and 706 numbers of maps
    space = DesignedSpace(nn.Sequential(Choice({"dense": nn.Conv2d(8, 8, 3), "depthwise": depthwise})))
    assert space.largest == space.architecture({"0": "dense"})
    assert space.smallest == space.architecture({"0": "depthwise", "0.depthwise.kernel_size": 3})
