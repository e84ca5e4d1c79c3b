"""Channels turned around give the same outputs, and what is kept positive stays so whatever training does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name, schema_index
from mil_cli.stages.quantize.lsq import LsqConfig, quantize
from mil_cli.stages.quantize.positive import keep_positive, mirror_channels, settle
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context


class Layers(nn.Module):
    """Every kind of layer that a batch norm is folded into, one norm that two layers share, one without a gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.grouped, self.norm2 = nn.Conv2d(6, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.up, self.norm3 = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), nn.BatchNorm2d(8)
        self.plain, self.without = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.a, self.b, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head, self.norm4 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm2(self.grouped(torch.relu(self.norm(self.conv(x))))))
        x = torch.relu(self.without(self.plain(torch.relu(self.norm3(self.up(x))))))
        x = self.shared(self.b(torch.relu(self.shared(self.a(x)))))
        return self.norm4(self.head(x.mean((2, 3))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model.capture(Layers(), (torch.randn(3, 2, 8, 8),)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point():
                value.normal_()
    return model


NAMES = ("conv", "grouped", "up", "plain", "a", "b", "head")


def layers(model: Model, *names: str) -> list[Node]:
    return [node for node in calls(model.graph) if str(get_argument_or_none(node)).removesuffix(".weight") in names]


def get_argument_or_none(node: Node) -> object:
    weight = get_argument(node, "weight") if schema_index(node, "weight") is not None else None
    return weight.target if isinstance(weight, Node) else None


def test_outputs_stay_the_same_and_gammas_become_positive(model: Model) -> None:
    mirrored, x = model.clone(), torch.randn(5, 2, 8, 8)
    gammas, left = mirror_channels(mirrored, layers(mirrored, *NAMES))
    assert gammas == ["norm.weight", "norm2.weight", "norm3.weight", "norm4.weight"]
    assert left == set(layers(mirrored, "a", "b"))
    before, after = model.state_dict(), mirrored.state_dict()
    assert all(bool((before[name] < 0).any()) and bool((after[name] >= 0).all()) for name in gammas)
    assert torch.equal(after["shared.weight"], before["shared.weight"])
    torch.testing.assert_close(mirrored(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fold_batch_norm(mirrored)(x), fold_batch_norm(model)(x), rtol=1e-4, atol=1e-4)
    # in training too: a mirrored channel has the mirrored mean
    torch.testing.assert_close(mirrored.train()(x), model.train()(x), rtol=1e-3, atol=1e-3)


def test_only_the_layers_asked_for_are_turned_around(model: Model) -> None:
    mirrored = model.clone()
    gammas, left = mirror_channels(mirrored, layers(mirrored, "grouped", "plain"))
    assert (gammas, left) == (["norm2.weight"], set())
    changed = {
        name for name, value in mirrored.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    }
    assert changed == {"grouped.weight", "norm2.weight", "norm2.running_mean"}


class Frozen(nn.Module):
    """A gamma that is no parameter, and one that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.requires_grad_(False)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.register_buffer("gamma", torch.tensor([-1.0, 1.0, -2.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.batch_norm(self.a(x), self.mean, self.var, self.gamma))
        return self.norm(self.b(x)).mean((2, 3))


def test_gammas_that_do_not_train_are_turned_around_and_stay_constant() -> None:
    model = Model.capture(Frozen().eval(), (torch.randn(3, 2, 8, 8),))
    mirrored, x = model.clone(), torch.randn(3, 2, 8, 8)
    assert mirror_channels(mirrored, layers(mirrored, "a", "b")) == ([], set())
    assert mirrored.state_dict()["gamma"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert {name for name, _ in mirrored.named_parameters()} == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(mirrored(x), model(x), rtol=1e-4, atol=1e-5)


class Awkward(nn.Module):
    """A norm that two layers share, and two norms in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.shared = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), norm(6)
        self.twice, self.first, self.second = nn.Conv2d(6, 6, 1), norm(6), norm(6)
        self.plain, self.own, self.head = nn.Conv2d(6, 6, 1), norm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(self.b(torch.relu(self.shared(self.a(self.stem(x)))))))
        x = torch.relu(self.own(self.plain(torch.relu(self.second(self.first(self.twice(x)))))))
        return self.head(x.mean((2, 3)))


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    nn.init.normal_(made.weight)
    return made


def test_every_norm_folds_after_training_and_codes_are_symmetric_where_they_must_be() -> None:
    torch.manual_seed(0)
    model = Model.capture(Awkward().eval(), (torch.randn(2, 1, 8, 8),))
    images, labels = torch.randn(256, 1, 8, 8), torch.randint(0, 3, (256,))
    split = TensorSplit((images, labels))
    context = make_context(
        Data(name="noise", train=split, val=split, test=split),
        device=DeviceProfile(name="test", int8=Int8Form(activations="uint8", reduce_range=False)),
        trainer=TrainerConfig(epochs=2, batch_size=64, learning_rate=0.05),
    )
    result = quantize(model, LsqConfig(weight_bits=4), context)
    assert not any(op_name(node) == "batch_norm" for node in calls(result.graph))
    limits = {
        str(node.args[0].target): node.args[4:]
        for node in calls(result.graph)
        if op_name(node) == "quantize_affine" and node.args[0].op == "get_attr"
    }
    assert limits == {
        "stem.weight": (-127, 127),
        "a.weight": (-7, 7),
        "b.weight": (-7, 7),
        "twice.weight": (-7, 7),
        "plain.weight": (-8, 7),
        "head.weight": (-127, 127),
    }


def test_kept_positive_through_steps_that_cross_zero(model: Model) -> None:
    gammas, _ = mirror_channels(model, layers(model, *NAMES))
    keep_positive(model.graph, dict.fromkeys(gammas, 1.0))
    assert sum(op_name(node) == "learned_scale" for node in calls(model.graph)) == len(gammas)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    for _ in range(5):
        optimizer.zero_grad()
        model.train()(torch.randn(8, 2, 8, 8)).square().mean().backward()
        optimizer.step()
    raw = {name: model.state_dict()[name].clone() for name in gammas}
    assert any(bool((value < 0).any()) for value in raw.values())
    x = torch.randn(5, 2, 8, 8)
    expected = model.eval()(x)
    settle(model.graph)
    assert torch.equal(model(x), expected)
    assert {name for name, _ in model.named_parameters()} >= set(gammas)
    for name, value in raw.items():
        assert torch.equal(model.state_dict()[name], value.abs().clamp(min=2.0**-64))
