"""The curvature of layers' inputs against what the layers give, and the factor of its inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls
from mil_cli.stages.curvature import input_curvature, inverse_factor
from tests.stages.contexts import make_context


def data_of(inputs: Tensor) -> Data:
    split = TensorSplit((inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    return Data(name="noise", train=split, val=split, test=split)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(3, 100, 8, generator=torch.Generator().manual_seed(0)).double()
    curvature = x.mT @ x
    factor = inverse_factor(curvature, 0.01)
    damped = curvature.clone()
    for each in damped:
        each.diagonal().add_(0.01 * each.diagonal().mean())
    torch.testing.assert_close(factor.mT @ factor, torch.linalg.inv(damped))
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(inverse_factor(curvature[1], 0.01), factor[1])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_dead_inputs_change_nothing_for_the_others(size: float) -> None:
    x = size * torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).double()
    alive, padded = x.T @ x, torch.nn.functional.pad(x, (0, 20))
    factor = inverse_factor(padded.T @ padded, 0.01)
    torch.testing.assert_close(factor[:8, :8], inverse_factor(alive, 0.01))
    assert not factor[:8, 8:].any()
    assert bool((factor.diagonal() > 0).all())


def test_curvature_of_dead_inputs_alone_can_be_inverted() -> None:
    factor = inverse_factor(torch.zeros(2, 3, 3, dtype=torch.float64), 0.01)
    torch.testing.assert_close(factor, 1.01**-0.5 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1)),
        nn.Conv1d(3, 4, 5, stride=2, padding=2),
        nn.Conv3d(3, 4, 2, padding=1),
        nn.Conv2d(3, 4, (4, 3), padding="same"),
        nn.Conv1d(3, 4, 4, padding="valid"),
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
    ],
)
@pytest.mark.parametrize("at_once", [2**22, 500, 1])
def test_windows_of_convolutions_give_their_outputs(
    layer: nn.Module, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the curvature of the windows, ``w H w^T`` is the sum of squares of what the layer gives."""
    monkeypatch.setattr("mil_cli.stages.curvature._NUMBERS_AT_ONCE", at_once)
    sides = {"Conv1d": (9,), "Conv2d": (9, 7), "Conv3d": (5, 4, 6)}[type(layer).__name__]
    inputs = torch.randn(20, 3, *sides, generator=torch.Generator().manual_seed(0))
    net = Model.capture(layer.eval(), (inputs[:2],))
    (node,) = calls(net.graph)
    curvature = input_curvature(net, node, make_context(data_of(inputs)), samples=20, batch_size=20)
    weight, bias = net.state_dict()["weight"].flatten(1).double(), net.state_dict()["bias"]
    rows = weight.reshape(len(curvature), -1, weight.shape[1])
    given = net(inputs).detach() - bias.reshape(1, -1, *[1] * len(sides))
    sums = given.double().square().transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close((rows @ curvature * rows).sum(2).flatten(), sums, rtol=1e-4, atol=1e-4)


def test_windows_of_large_images_are_not_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, double = torch.randn(2, 8, 64, 64), Tensor.double
    sizes: list[int] = []
    net = Model.capture(nn.Conv2d(8, 4, 3).eval(), (inputs,))

    def watching(value: Tensor) -> Tensor:
        sizes.append(value.numel())
        return double(value)

    monkeypatch.setattr("mil_cli.stages.curvature._NUMBERS_AT_ONCE", 10000)
    monkeypatch.setattr(Tensor, "double", watching)
    (node,) = calls(net.graph)
    input_curvature(net, node, make_context(data_of(inputs)), samples=2, batch_size=2)
    assert max(sizes) <= 10000
    assert sum(sizes) == 2 * 62 * 62 * 8 * 9


def test_vectors_of_any_rank() -> None:
    inputs = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.all = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.all(self.tokens(x).mean((0, 1)))  # a vector alone

    torch.manual_seed(0)
    net = Model.capture(Mean().eval(), (inputs,), dynamic={})
    first, _, last = calls(net.graph)
    rows = inputs.flatten(0, 1).double()
    used = make_context(data_of(inputs))
    torch.testing.assert_close(input_curvature(net, first, used, samples=6, batch_size=6)[0], rows.T @ rows)
    with torch.no_grad():
        mean = nn.functional.linear(inputs, *(net.state_dict()[f"tokens.{name}"] for name in ("weight", "bias"))).mean(
            (0, 1)
        )
    found = input_curvature(net, last, used, samples=6, batch_size=6)[0]
    torch.testing.assert_close(found, mean.double().outer(mean.double()), rtol=1e-5, atol=1e-6)


def test_windows_of_one_sample_without_an_axis_of_samples() -> None:
    inputs = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))

    class First(nn.Module):
        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[0])

    layer = nn.Conv2d(4, 6, 3, groups=2).eval()
    found = []
    for module in (layer, First(layer)):
        net = Model.capture(module, (inputs,), dynamic={})
        found.append(
            input_curvature(net, list(calls(net.graph))[-1], make_context(data_of(inputs)), samples=1, batch_size=1)
        )
    torch.testing.assert_close(*found)
