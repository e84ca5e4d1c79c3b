"""Cross-layer equalisation: the same outputs from weights of the same ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.equalisation import equalise
from mil_cli.stages.quantize.rescale import find_links, made_range, read_range
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.contexts import make_context


class Separable(nn.Module):
    """Inverted residuals with ReLU, whose channels differ a thousandfold."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for groups, channels in ((1, 16), (16, 16), (1, 16)):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=groups), nn.BatchNorm2d(channels), nn.ReLU()]
        self.body = nn.Sequential(nn.Conv2d(1, 16, 1), *layers)
        self.head = nn.Linear(16, 4)
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.running_var, 2.0)  # type: ignore[arg-type]
                module.weight.data = torch.logspace(-1.5, 1.5, 16)[torch.randperm(16)]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def captured() -> Model:
    torch.manual_seed(0)
    return Model.capture(Separable().eval(), (torch.randn(2, 1, 6, 6),))


@pytest.fixture
def model(captured: Model) -> Model:
    torch.manual_seed(0)
    return captured.clone()


def folded(model: Model) -> Model:
    result = fold_batch_norm(model)
    make_functional(result.graph)
    return result


def test_ranges_are_equal_afterwards_and_outputs_the_same(model: Model) -> None:
    x = torch.randn(8, 1, 6, 6)
    equalised = folded(model)
    links = list(find_links(equalised.graph))
    assert equalise(equalised.graph) == len(links) == 4
    for link in links:
        made, read = made_range(equalised.graph, link.maker), read_range(equalised.graph, link.readers[0])
        torch.testing.assert_close(made, read, rtol=3e-3, atol=0)
    expected = model(x)
    torch.testing.assert_close(equalised(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def test_a_pair_gets_the_geometric_mean() -> None:
    torch.manual_seed(0)
    model = Model.capture(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), (torch.randn(2, 3),))
    first, second = model.graph.get_parameter("0.weight"), model.graph.get_parameter("2.weight")
    with torch.no_grad():
        first[1], second[:, 2] = 0, 0
    bias = model.graph.get_parameter("0.bias")
    with torch.no_grad():
        bias.mul_(0.1)
        bias[1], bias[3] = 0, 2.0  # larger than the weights: it is what counts
    mean = (torch.maximum(first.abs().amax(1), bias.abs()) * second.abs().amax(0)).sqrt().detach()
    silent = [first.abs().amax(1)[2].item(), second.abs().amax(0)[1].item()]
    equalise(model.graph)
    made = torch.maximum(model.graph.get_parameter("0.weight").abs().amax(1), model.graph.get_parameter("0.bias").abs())
    found = made, model.graph.get_parameter("2.weight").abs().amax(0)
    for each in found:
        torch.testing.assert_close(each[[0, 3, 4]], mean[[0, 3, 4]])
    assert [found[0][2].item(), found[1][1].item()] == silent


def test_one_scale_for_a_whole_weight_loses_less(model: Model) -> None:
    x = torch.randn(256, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    split = TensorSplit((x, torch.zeros(256, dtype=torch.int64)))
    context = make_context(Data(name="noise", train=split, val=split, test=split))
    before = model.fingerprint()
    errors = []
    for wanted in (False, True):
        config = StaticConfig(weight_bits=6, first_last_bits=6, per_channel=False, equalise=wanted)
        errors.append(float((quantize(model, config, context)(x) - model(x)).detach().norm()))
    assert errors[1] < 0.5 * errors[0]
    assert context.notes["equalised_pairs"] == 4
    assert model.fingerprint() == before


def test_a_channel_that_is_nearly_its_bias_stays_within_the_range_of_activations() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight[:4] *= 1e-6  # type: ignore[operator]
        net[0].bias[:4] = 0.5  # type: ignore[index]
    model = Model.capture(net, (torch.randn(2, 8),))
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    split = TensorSplit((x, torch.zeros(256, dtype=torch.int64)))
    context = make_context(Data(name="noise", train=split, val=split, test=split))
    plain, equalised = (
        float((quantize(model, StaticConfig(equalise=wanted), context)(x) - model(x)).detach().norm())
        for wanted in (False, True)
    )
    assert equalised < 1.5 * plain
