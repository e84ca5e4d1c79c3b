"""No-grad and autocast regions are written out and keep their meaning."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.drop(self.frozen(x)) + torch.tensor([1.0, 2.0, 3.0, 4.0])
            with torch.autocast("cpu", enabled=False):
                z = y.cos()
        with torch.autocast("cpu", enabled=False):
            out = self.trained(y + x)
        return out * z, z


def test_values_gradients_and_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Regions()
    model = Model.capture(module, (torch.randn(4, 4),))
    assert model.spec.notices == ()
    assert {"linear", "dropout", "cos", "detach"} <= {op_name(node) for node in calls(model.graph)}
    assert not any("wrap" in op_name(node) for node in calls(model.graph))
    assert model.macs() == 2 * 16
    assert set(model.state_dict()) == set(module.state_dict())
    x = torch.randn(6, 4)
    eager = copy.deepcopy(module).train()
    model.train()
    torch.manual_seed(2)
    actual = model(x)
    torch.manual_seed(2)
    expected = eager(x)
    torch.testing.assert_close(actual, expected)
    actual[0].sum().backward()
    expected[0].sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in eager.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None
        else:
            torch.testing.assert_close(gradients[name].grad, parameter.grad)
    model.eval()
    model.save(tmp_path / "m.pt2")
    loaded = Model.load(tmp_path / "m.pt2")
    assert torch.equal(loaded(x)[0], model(x)[0])
    assert loaded.fingerprint() == model.fingerprint()
    assert model.clone().fingerprint() == model.fingerprint()


class HalfPrecision(nn.Module):
    """Layers, sums of two types, norms with a scale of another type, and what autocast leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.relu(self.norm(self.first(x)))
            y = torch.cat([self.second(y) + self.scale, y.float()], 1)
            z = torch.einsum("bchw,bdhw->bcd", y, y)
        return z.float().softmax(-1)


def test_autocast_is_written_out_as_casts() -> None:
    torch.manual_seed(0)
    module = HalfPrecision().eval()
    model = Model.capture(module, (torch.randn(2, 3, 8, 8),))
    names = {op_name(node) for node in calls(model.graph)}
    assert not any("wrap" in name for name in names)
    assert {"conv2d", "to", "einsum"} <= names
    x = torch.randn(3, 3, 8, 8)
    actual, expected = model(x), module(x)
    assert torch.equal(actual, expected)
    (actual[..., 0] ** 2).sum().backward()
    (expected[..., 0] ** 2).sum().backward()
    gradients = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0.02, atol=1e-4)
