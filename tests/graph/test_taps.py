"""Taps against forward hooks on the eager module."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mil_cli.ops  # noqa: F401  registers the quantizers
from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.graph.taps import module_output, module_outputs, tap, tappable_paths
from mil_cli.models.vit import vit


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.blocks(F.relu(self.stem(x)))
        tokens = x.flatten(2).transpose(1, 2)
        mixed, weights = self.attention(tokens, tokens, tokens)
        return {"logits": self.head(mixed.mean(1)), "weights": weights}


@cache
def shared() -> tuple[Net, Model]:
    torch.manual_seed(0)
    module = Net()
    return module, Model.capture(module, (torch.randn(4, 3, 8, 8),))


def captured() -> Model:
    """Return a copy of the captured net."""
    return shared()[1].clone()


PATHS = ["stem", "blocks.0.norm", "blocks.1.act", "blocks.1", "blocks", "head"]


def hooked(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    handles = []
    for path in PATHS:
        child = module.get_submodule(path)
        # clone: a later in-place activation overwrites what a hook was shown
        handles.append(child.register_forward_hook(lambda _m, _i, out, path=path: values.update({path: out.clone()})))
    module(x)
    for handle in handles:
        handle.remove()
    return values


@pytest.mark.parametrize("training", [False, True])
def test_values_are_those_of_hooks(training: bool) -> None:
    module, model = shared()[0], captured().train(training)
    x = torch.randn(6, 3, 8, 8)
    expected = hooked(copy.deepcopy(module).train(training), x)
    outputs, values = tap(model, PATHS)(x)
    assert list(values) == PATHS
    for path in PATHS:
        torch.testing.assert_close(values[path], expected[path], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["logits"], values["head"])


def test_gradients_reach_the_models_own_weights_and_statistics() -> None:
    model = captured().train()
    before = model.state_dict()["blocks.1.norm.running_mean"].clone()
    _, values = tap(model, ["blocks.0"])(torch.randn(4, 3, 8, 8))
    values["blocks.0"].square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["stem.weight"] is not None
    assert gradients["blocks.1.conv.weight"] is None
    assert not torch.equal(model.state_dict()["blocks.1.norm.running_mean"], before)


def test_it_follows_weights_and_mode() -> None:
    model = captured()
    tapped = tap(model, ["blocks"])
    x = torch.randn(4, 3, 8, 8)
    evaluated = tapped(x)[1]["blocks"]
    model.train()
    assert not torch.allclose(tapped(x)[1]["blocks"], evaluated)
    model.eval()
    with torch.no_grad():
        model.graph.get_parameter("blocks.1.norm.bias").add_(3.0)
    assert tapped(x)[1]["blocks"].mean() > evaluated.mean() + 1.0
    assert tapped.paths == ("blocks",)


@pytest.mark.slow
def test_the_model_is_not_changed() -> None:
    model = captured()
    code, fingerprint = model.graph.code, model.fingerprint()
    tap(model, PATHS)(torch.randn(2, 3, 8, 8))
    assert (model.graph.code, model.fingerprint()) == (code, fingerprint)
    assert set(model(torch.randn(2, 3, 8, 8))) == {"logits", "weights"}


def test_unknown_paths_are_refused() -> None:
    model = captured()
    with pytest.raises(ModelError, match=r"did you mean 'blocks\.1'"):
        tap(model, ["blocks.l"])
    with pytest.raises(ModelError):
        module_output(model, "")
    assert set(PATHS) <= set(tappable_paths(model))


def test_all_outputs_at_once_are_those_of_each() -> None:
    model = captured()
    found = module_outputs(model)
    assert tappable_paths(model) == list(found)
    assert {path: module_output(model, path) for path in found} == found


def test_of_a_quantized_value_it_is_what_all_read() -> None:
    model = captured()
    value, graph = module_output(model, "blocks.0"), model.graph.graph
    users = list(value.users)
    scale = torch.tensor(0.5)
    model.graph.register_buffer("scale", scale)
    model.graph.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
    with graph.inserting_before(value):
        pair = graph.get_attr("scale"), graph.get_attr("zero_point")
    with graph.inserting_after(value):
        shared = graph.call_function(torch.ops.mil.quantize_affine.default, (value, *pair, None, -127, 127))
    with graph.inserting_after(shared):
        narrow = graph.call_function(torch.ops.mil.quantize_affine.default, (shared, *pair, None, -1, 1))
    for node in (shared, narrow):
        node.meta = dict(value.meta)
    conv, addition = sorted(users, key=lambda user: user.name == "add_1")
    conv.replace_input_with(value, narrow)
    addition.replace_input_with(value, shared)
    assert module_output(model, "blocks.0") is shared
    addition.replace_input_with(shared, narrow)
    assert module_output(model, "blocks.0") is narrow


@pytest.mark.slow
def test_paths_survive_an_archive(tmp_path) -> None:
    model = captured()
    model.save(tmp_path / "m.pt2")
    loaded = Model.load(tmp_path / "m.pt2")
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = tap(model, PATHS)(x)[1], tap(loaded, PATHS)(x)[1]
    assert all(torch.equal(ours[path], theirs[path]) for path in PATHS)


def test_every_path_that_is_listed_can_be_read() -> None:
    """Capturing leaves operations that name a module of its own, of which nothing is used outside."""
    model = Model.capture(vit(depth=1, dim=8, heads=2).eval(), (torch.randn(2, 1, 28, 28),))
    paths = tappable_paths(model)
    assert "blocks.0" in paths
    _, values = tap(model, paths)(*model.samples[0])
    assert list(values) == paths


class WritesIntoParts(nn.Module):
    """Writes into a part of what a module gave, and into a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, 2:5] *= 2
        x = self.second(x)
        x.view(x.shape[0], 2, 4, *x.shape[2:])[:, 0].mul_(3)
        return x


def test_values_are_those_before_parts_are_written_into() -> None:
    module = WritesIntoParts().eval()
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),))
    given: dict[str, Tensor] = {}
    for name, part in module.named_children():
        part.register_forward_hook(lambda _, __, result, name=name: given.update({name: result.detach().clone()}))
    x = torch.randn(2, 3, 8, 8)
    expected = module(x)
    output, values = tap(model, ["first", "second"])(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(values, given)
