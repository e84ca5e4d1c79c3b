"""Layers that compute their weights from parameters are quantized after training as if the weights were their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.settle import fold_weights
from mil_cli.stages.quantize.static import StaticConfig, quantize
from tests.stages.contexts import make_context

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """Weights of mean 0 and deviation 1 for each output (Qiao et al. 2019), by a batch norm as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Standardised(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = weight_norm(nn.Conv2d(8, 8, 3))
        self.third = spectral_norm(nn.Conv2d(8, 8, 1))
        self.head = weight_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def net() -> Model:
    return Model.capture(Net().eval(), (IMAGES[:2],))


def test_plain_weights_give_the_same_outputs(net: Model) -> None:
    plain = fold_weights(net)
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)
    weights = {name for name, value in plain.named_parameters() if value.ndim > 1}
    assert weights == {"first.weight", "second.weight", "third.weight", "head.weight"}
    assert sum(value.numel() for value in plain.state_dict().values()) < net.num_params()


def test_weights_that_something_else_reads_stay_computed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, torch.tanh(self.layer.weight)) + self.layer(x)

    module = Shared().eval()
    shared = Model.capture(module, (torch.randn(2, 4),))
    before = fold_weights(shared)
    assert dict(before.named_parameters()).keys() == dict(shared.named_parameters()).keys()
    x = torch.randn(3, 4)
    assert torch.equal(before(x), shared(x))


def test_every_layer_runs_on_integers(net: Model, tmp_path: Path) -> None:
    split = TensorSplit((IMAGES, torch.zeros(len(IMAGES), dtype=torch.int64)))
    context = make_context(Data(name="noise", train=split, val=split, test=split))
    model = quantize(net, StaticConfig(), context)
    assert context.notes["quantized_layers"] == 4
    assert context.notes["kept_float"] == {}
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer == {"QGemm": 1, "QLinearConv": 3}
    check_parity(model, path, [((IMAGES,), {})])
