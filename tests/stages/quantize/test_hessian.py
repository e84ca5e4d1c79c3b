"""Traces of the Hessian by random vectors against traces of Hessians that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.hessian import hessian_traces
from mil_cli.task.classification import Classification
from tests.stages.contexts import make_context


class Net(nn.Module):
    """Attention between two layers: what has more than one kernel has a second derivative in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        y = nn.functional.scaled_dot_product_attention(y, y, y)
        logits: Tensor = self.head(y.mean(1))
        return logits


def made() -> tuple[Net, Data]:
    torch.manual_seed(0)
    inputs, labels = torch.randn(32, 2, 3), torch.randint(0, 3, (32,))
    split = TensorSplit((inputs, labels))
    return Net(), Data(name="noise", train=split, val=split, test=split)


def traces(net: nn.Module, data: Data, names: list[str], **limits: Any) -> tuple[list[float], Tensor]:
    model = Model.capture(net.eval(), (torch.randn(2, 2, 3),))
    before = model.fingerprint()
    found: list[list[float]] = []
    saved: list[int] = []
    options: dict[str, Any] = {"samples": 32, "probes": 200, **limits}
    context = make_context(data)
    means = hessian_traces(model, names, context, **options, found=found, keep=lambda: saved.append(len(found)))
    assert saved == list(range(1, options["probes"] + 1))
    assert model.fingerprint() == before
    return means, torch.tensor(found)


def test_the_mean_is_the_trace_that_is_written_out() -> None:
    net, data = made()
    names = ["inner.weight", "head.weight"]
    (batch,) = data.train.batches(32)
    means, found = traces(net, data, names)
    for name, mean, draws in zip(names, means, found.T, strict=True):
        parameters = dict(net.named_parameters())

        def loss(weight: Tensor, name: str = name, others: dict[str, Any] = parameters) -> Tensor:
            logits = functional_call(net, {**others, name: weight}, (batch[0],))  # type: ignore[index]
            return nn.functional.cross_entropy(logits, batch[1])  # type: ignore[index]

        size = parameters[name].numel()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            full: Any = hessian(loss, parameters[name].detach())
        exact = float(full.reshape(size, size).trace())
        spread = float(draws.std()) / len(draws) ** 0.5
        assert abs(mean - exact) < 4 * spread
        assert spread < 0.3 * exact


class Rounded(torch.autograd.Function):
    """Has a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_loss_without_a_second_derivative_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = made()
    loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda self, out, batch: loss(self, Rounded.apply(out), batch))
    with pytest.raises(StageError, match="the loss has no second derivative") as caught:
        traces(net, data, ["head.weight"])
    assert "sensitivity: loss" in str(caught.value)
