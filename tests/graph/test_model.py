"""Clones, fingerprints, batches, calls."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.mix.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)) * self.scale)


@pytest.fixture(scope="module")
def captured() -> Model:
    torch.manual_seed(0)
    return Model.capture(Tied(), (torch.randint(0, 12, (4, 6)),))


@pytest.fixture
def model(captured: Model) -> Model:
    torch.manual_seed(0)
    return captured.clone()


def test_a_clone_is_deep_and_keeps_everything(model: Model) -> None:
    clone = model.clone()
    assert clone.fingerprint() == model.fingerprint()
    assert clone.graph.get_parameter("head.weight") is clone.graph.get_parameter("embed.weight")
    assert clone.graph.get_parameter("head.weight") is not model.graph.get_parameter("head.weight")
    assert not clone.graph.get_parameter("mix.bias").requires_grad
    assert list(clone.state_dict()) == list(model.state_dict())
    assert "scale" not in clone.clone().state_dict()
    assert len(list(clone.parameters())) == 3
    with torch.no_grad():
        clone.graph.get_parameter("embed.weight").add_(1)
    assert clone.fingerprint() != model.fingerprint()


def test_fingerprints_see_weights_buffers_graph_and_names(model: Model) -> None:
    base = model.fingerprint()
    assert model.fingerprint() == base
    changed = model.clone()
    changed.graph.get_buffer("scale").fill_(3.0)
    assert changed.fingerprint() != base
    changed = model.clone()
    node = next(node for node in changed.graph.graph.nodes if node.name == "mul")
    node.target = torch.ops.aten.add.Tensor
    assert changed.fingerprint() != base
    changed = model.clone()
    changed.spec = model.spec.with_(task="classification")
    assert changed.fingerprint() != base
    changed.spec = model.spec.with_(notices=("a notice",), source="elsewhere")
    assert changed.fingerprint() == base


def test_state_dicts_load(model: Model) -> None:
    other = Tied()
    model.load_state_dict(other.state_dict())
    ids = torch.randint(0, 12, (3, 6))
    torch.testing.assert_close(model(ids), other(ids))
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({})


def test_calls_by_name(model: Model) -> None:
    ids = torch.randint(0, 12, (3, 6))
    assert torch.equal(model(ids), model(ids=ids))


def test_flat_inputs_check_the_form(model: Model) -> None:
    with pytest.raises(ModelError, match="the model takes: ids"):
        model.flat_inputs(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ModelError, match="gives 1 tensors"):
        model.unflatten_outputs([])


def test_batches(model: Model) -> None:
    for size in (1, 4, 5, 13):
        (ids,), _ = model.batch_input(size)
        assert ids.shape == (size, 6)
        assert torch.equal(ids[: min(size, 5)], model.samples[0][0][: min(size, 5)])
    with pytest.raises(ModelError, match="at least one"):
        model.batch_input(0)
    fixed = Model.capture(nn.Linear(3, 2), (torch.randn(4, 3),), dynamic={})
    assert fixed.batch_input(4)[0][0].shape == (4, 3)
    with pytest.raises(ModelError, match="fixed sizes"):
        fixed.batch_input(5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_trains_it(precision: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = Model.capture(module, (torch.randn(4, 3, 8, 8),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        wrapped, optimizer = fabric.setup(model.graph, torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped.train()
    assert model.training
    inputs, targets = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(wrapped(inputs), targets)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(model.state_dict()["1.running_mean"], torch.zeros(8))
    wrapped.eval()
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(wrapped(inputs).float(), model(inputs), rtol=0.05, atol=0.05)


def test_a_model_of_a_copied_graph_module(model: Model) -> None:
    """Plain deepcopy of the graph loses methods and persistence; making a Model of it mends both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = copy.deepcopy(model.graph)
    copied = Model(graph=graph, spec=model.spec, samples=model.samples)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert copied.fingerprint() == model.fingerprint()
    copied.graph.train()
    assert copied.training


class Waves(nn.Module):
    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        sine, cosine = torch.sin(y), torch.cos(y)
        if self.writes:
            y.add_(1)
        return sine * cosine + y


@pytest.mark.parametrize("writes", [False, True])
def test_the_order_of_independent_calls_counts_only_where_something_is_written_into(writes: bool) -> None:
    model = Model.capture(Waves(writes=writes).eval(), (torch.randn(2, 3),))
    moved = model.clone()
    nodes = {node.name: node for node in moved.graph.graph.nodes}
    nodes["cos"].append(nodes["sin"])
    moved.graph.recompile()
    assert (moved.fingerprint() == model.fingerprint()) is not writes


def test_fingerprints_do_not_depend_on_how_arguments_are_passed(model: Model) -> None:
    changed = model.clone()
    linear = next(node for node in changed.graph.graph.nodes if node.name == "linear")
    linear.args, linear.kwargs = linear.args[:2], {"bias": linear.args[2]}
    changed.graph.recompile()
    assert changed.fingerprint() == model.fingerprint()
    linear.kwargs = {}
    assert changed.fingerprint() != model.fingerprint()
