"""The losses that shape made inputs: against closed forms, against eager hooks, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.model import Model
from mil_cli.graph.taps import Tapped
from mil_cli.models.resnet import resnet20
from mil_cli.stages.distill.inversion import (
    NormStatistics,
    activation_loss,
    agreement,
    balance_loss,
    certainty_loss,
    last_features,
    variation,
)
from mil_cli.training.batch_norm import recalibrate


def _distance(model: Model, x: Tensor, **settings: float) -> Tensor:
    statistics = NormStatistics(model, **settings)
    _, values = Tapped(model, statistics.taps)(x)
    return statistics.distance(values)


def test_data_with_exactly_the_running_statistics_have_no_distance() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()
    model = recalibrate(Model.capture(net, (x[:2],)), [((x,), {})])
    assert float(_distance(model, x).detach()) == pytest.approx(0.0, abs=1e-5)
    # A shifted batch is as far as its mean after the convolution moved, in all channels together.
    moved = net[0](torch.ones(1, 3, 6, 6)) - net[0](torch.zeros(1, 3, 6, 6))
    expected = torch.linalg.vector_norm(moved[0, :, 0, 0])
    torch.testing.assert_close(_distance(model, x + 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_distance(model, x + 1, first_weight=3.0), 3 * expected, rtol=1e-4, atol=1e-5)


def test_the_distance_of_a_deep_net_is_that_of_eager_hooks() -> None:
    torch.manual_seed(1)
    net = resnet20(width=4, blocks=1)
    x = torch.randn(8, 1, 8, 8)
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8) * 2 + 1)
    net.eval()
    model = Model.capture(net, (x[:2],))
    gaps = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].transpose(0, 1).flatten(1)
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_mean is not None
        assert module.running_var is not None
        mean_gap = (flat.mean(1) - module.running_mean).square().sum().sqrt()
        gaps.append(mean_gap + (flat.var(1) - module.running_var).square().sum().sqrt())

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(watch)
    net(x)
    assert len(gaps) == 9
    torch.testing.assert_close(_distance(model, x), torch.stack(gaps).sum())
    torch.testing.assert_close(_distance(model, x, first_weight=10.0), torch.stack(gaps).sum() + 9 * gaps[0])


def test_the_distance_has_a_gradient_by_the_inputs_alone() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    model = Model.capture(net, (torch.randn(2, 1, 5, 5),))
    model.graph.requires_grad_(False)
    x = torch.randn(6, 1, 5, 5, requires_grad=True)
    _distance(model, x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_certain_scores_cost_nothing_and_equal_ones_the_logarithm() -> None:
    certain = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert float(certainty_loss(certain)) == pytest.approx(0.0, abs=1e-6)
    assert float(certainty_loss(torch.zeros(5, 3))) == pytest.approx(math.log(3))
    odd = torch.tensor([[math.log(3), 0.0]])  # probabilities 3/4 and 1/4
    assert float(certainty_loss(odd)) == pytest.approx(-math.log(0.75))


def test_an_even_share_of_the_classes_has_the_lowest_balance() -> None:
    even = 60.0 * torch.eye(4)
    assert float(balance_loss(even)) == pytest.approx(-math.log(4), abs=1e-5)
    one = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    assert float(balance_loss(one)) == pytest.approx(0.0, abs=1e-5)
    halves = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))  # mean 3/4 and 1/4
    assert float(balance_loss(halves)) == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25), abs=1e-6)


def test_activation_and_variation_by_hand() -> None:
    assert float(activation_loss(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))) == pytest.approx(-1.5)
    image = torch.tensor([[[[0.0, 1.0], [4.0, 2.0]]]])
    down, right = (4.0 + 1.0) / 2, (1.0 + 2.0) / 2
    assert float(variation(image)) == pytest.approx(down + right)
    assert float(variation(torch.full((2, 3, 4, 4), 7.0))) == 0.0
    assert float(variation(torch.randn(4, 5))) == 0.0


def test_agreement_counts_only_samples_that_both_put_in_one_class() -> None:
    student = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]))
    teacher = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]))
    first = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)
    assert float(agreement(student, teacher)) == pytest.approx(-first / 2, abs=1e-6)
    assert float(agreement(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_the_last_features_are_what_the_head_reads() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Softmax(1)).eval()
    x = torch.randn(4, 5)
    model = Model.capture(net, (x,))
    node = last_features(model)
    assert node is not None
    _, values = Tapped(model, {"features": node})(x)
    torch.testing.assert_close(values["features"], net[:2](x))
    assert last_features(Model.capture(nn.ReLU(), (x,))) is None
