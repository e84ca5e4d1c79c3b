"""Channels turned around give the same outputs, and what is kept positive stays so whatever training does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.stages.quantize.positive import keep_positive, mirror_channels, settle


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


def test_outputs_stay_the_same_and_gammas_become_positive(model: Model) -> None:
    mirrored, x = model.clone(), torch.randn(5, 2, 8, 8)
    gammas = mirror_channels(mirrored)
    assert gammas == ["norm.weight", "norm2.weight", "norm3.weight", "norm4.weight"]
    before, after = model.state_dict(), mirrored.state_dict()
    assert all(bool((before[name] < 0).any()) and bool((after[name] >= 0).all()) for name in gammas)
    assert torch.equal(after["shared.weight"], before["shared.weight"])
    torch.testing.assert_close(mirrored(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fold_batch_norm(mirrored)(x), fold_batch_norm(model)(x), rtol=1e-4, atol=1e-4)
    # in training too: a mirrored channel has the mirrored mean
    torch.testing.assert_close(mirrored.train()(x), model.train()(x), rtol=1e-3, atol=1e-3)


def test_kept_positive_through_steps_that_cross_zero(model: Model) -> None:
    gammas = mirror_channels(model)
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
