"""The train/eval switch: against the eager module, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.graph.mode import mode_arguments
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name


class Everything(nn.Module):
    """A layer of each kind that knows training; dropout probabilities of 1 make it deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.instance = nn.InstanceNorm2d(8, track_running_stats=True)
        self.plain_instance = nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.plain_instance(self.instance(x))
        return self.head(x.amax((2, 3)))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Everything()


@pytest.fixture(scope="module")
def captured(module: nn.Module) -> Model:
    return Model.capture(module, (torch.randn(4, 3, 8, 8),))


@pytest.fixture
def model(captured: Model) -> Model:
    return captured.clone()


def test_trains_as_the_eager_module(module: nn.Module, model: Model) -> None:
    model.train()
    eager = copy.deepcopy(module).train()
    inputs, targets = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, eager)]
    losses = []
    for _ in range(12):
        for each, optimizer in zip((model, eager), optimizers, strict=True):
            loss = F.cross_entropy(each(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    state = eager.state_dict()
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)
    assert not torch.equal(model.state_dict()["norm.running_mean"], module.state_dict()["norm.running_mean"])
    model.eval()
    torch.testing.assert_close(model(inputs), eager.eval()(inputs), rtol=1e-3, atol=1e-4)


def test_switching_back_gives_the_same_graph(model: Model) -> None:
    code, fingerprint = model.graph.code, model.fingerprint()
    model.train()
    assert model.training
    assert model.graph.code != code
    assert model.fingerprint() == fingerprint
    model.eval()
    assert not model.training
    assert model.graph.code == code


def test_the_graph_modules_own_methods_switch(model: Model) -> None:
    assert model.graph.train() is model.graph
    assert model.training
    assert model.graph.eval() is model.graph
    assert not model.training
    wrapper = nn.Sequential(model.clone().graph)
    wrapper.train()
    assert wrapper[0].training


def test_a_clone_switches_alone(model: Model) -> None:
    code = model.graph.code
    clone = model.clone().train()
    assert model.graph.code == code
    assert not model.training
    assert clone.clone().training


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(1.0), nn.Dropout2d(1.0), nn.AlphaDropout(0.5), nn.RReLU(-3.0, -2.0), nn.FeatureAlphaDropout(0.5)],
    ids=lambda layer: type(layer).__name__,
)
def test_random_layers_act_only_in_training(layer: nn.Module) -> None:
    model = Model.capture(layer, (torch.randn(4, 3, 8, 8),))
    x = -torch.rand(4, 3, 8, 8) - 1.0
    torch.testing.assert_close(model(x), layer.eval()(x))
    model.train()
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(actual, layer.train()(x))
    assert not torch.equal(actual, layer.eval()(x))


def test_norms_without_statistics_stay_on() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    model = Model.capture(Always(), (torch.randn(4, 3, 8, 8),))
    norm = next(node for node in calls(model.graph) if op_name(node) == "batch_norm")
    assert mode_arguments(norm)["training"] == (True, True)
    x = torch.randn(6, 3, 8, 8)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.train().eval()(x), expected)


def test_decomposed_batch_norm_trains() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),))
    norm = next(node for node in calls(model.graph) if op_name(node) == "batch_norm")
    x, weight, bias, mean, variance, _, momentum, eps, _ = norm.args
    graph = model.graph.graph
    with graph.inserting_before(norm):
        arguments = (x, weight, bias, mean, variance, momentum, eps)
        core = graph.call_function(torch.ops.aten._native_batch_norm_legit_no_training.default, arguments)
        from operator import getitem

        first = graph.call_function(getitem, (core, 0))
    norm.replace_all_uses_with(first)
    graph.erase_node(norm)
    model.graph.recompile()
    inputs = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(model(inputs), module.eval()(inputs))
    torch.testing.assert_close(model.train()(inputs), module.train()(inputs))
    torch.testing.assert_close(model.state_dict()["1.running_var"], module.state_dict()["1.running_var"])
    torch.testing.assert_close(model.eval()(inputs), module.eval()(inputs))
