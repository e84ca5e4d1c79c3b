"""Multiply-accumulates against torch's own counter and against closed forms."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.graph.count import count_layers
from mil_cli.graph.model import Model


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8, padding=1)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.avg_pool2d(self.up(self.depthwise(x)), 2)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.encoder(tokens)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gru(self.lstm(self.embed(ids))[0])[0]


class Products(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.einsum("bij,bkj->bik", x, y) + x @ y.transpose(1, 2)
        b = torch.bmm(x, y.transpose(1, 2)) + torch.baddbmm(a, x, y.transpose(1, 2))
        return b @ torch.ones(x.shape[1]) + torch.einsum("bij,bkj,bik->bi", x, y, a)


def counted_by_torch(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Count with torch's dispatcher-level counter, recurrence and attention written out as matrix products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
        with plain[0], plain[1], FlopCounterMode(display=False) as counter, torch.no_grad():
            module.eval()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Convolutions(), (torch.randn(4, 3, 16, 16),)),
        (Transformer(), (torch.randn(4, 3, 16, 16),)),
        pytest.param(Recurrent(), (torch.randint(0, 11, (4, 7)),), marks=pytest.mark.slow),
    ],
    ids=["convolutions", "transformer", "recurrent"],
)
def test_agrees_with_torchs_counter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        one = tuple(tensor[:1] for tensor in inputs)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = counted_by_torch(module, one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    model = Model.capture(module, inputs)
    assert model.macs() == expected
    assert sum(layer.macs for layer in count_layers(model)) == expected


def test_products_by_hand() -> None:
    model = Model.capture(Products(), (torch.randn(4, 6, 8), torch.randn(4, 6, 8)))
    one_product = 6 * 6 * 8
    # The three-operand einsum is contracted from the left over i, j, k without an output that drops j or k early.
    three = 6 * 6 * 8 + 6 * 6
    assert model.macs() == 4 * one_product + 6 * 6 + three


class SingleSamples(nn.Module):
    """Takes ``[3, 8, 8]``, without an axis of samples, and products of single vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.scores = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(self.convolution(x)).mean(1)
        scored = F.linear(rows, self.scores) + torch.addmv(rows[:, 0], rows, self.scores)
        added = torch.zeros(4, 4).addmm_(rows, rows.T)
        return torch.inner(rows, rows) + scored[:, None] + added


def test_single_samples_and_vectors_by_hand() -> None:
    model = Model.capture(SingleSamples(), (torch.randn(3, 8, 8),), dynamic={})
    convolution, up = 6 * 8 * 8 * 9, 6 * 8 * 8 * 4 * 2 * 2
    products = 4 * 16 + 4 * 16 + 4 * 4 * 16 + 4 * 4 * 16
    assert model.macs() == convolution + up + products


def test_what_nothing_reads_does_not_count() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x).relu()
            return self.used(x)

    model = Model.capture(Wasteful(), (torch.randn(3, 6),))
    assert model.macs() == 24
    assert model.num_params() == 28
    assert any("unused.weight" in notice for notice in model.spec.notices)


def test_layers_carry_shape_module_and_parameters() -> None:
    model = Model.capture(Convolutions(), (torch.randn(4, 3, 16, 16),))
    layers = {layer.module: layer for layer in count_layers(model) if layer.params}
    assert layers["stem"].shape == (1, 8, 8, 8)
    assert layers["stem"].macs == 8 * 8 * 8 * 3 * 9
    assert layers["stem"].params == 3 * 8 * 9 + 8
    assert layers["norm"].macs == 0
    assert layers["norm"].params == 16
    assert sum(layer.params for layer in layers.values()) == model.num_params()


def test_counting_changes_nothing() -> None:
    model = Model.capture(Convolutions(), (torch.randn(4, 3, 16, 16),)).train()
    before = model.fingerprint()
    model.macs()
    assert model.training
    assert model.fingerprint() == before


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Model.capture(Tied(), (torch.randn(3, 6),))
    assert model.num_params() == 36
    assert model.macs() == 72
    assert [layer.params for layer in count_layers(model)] == [36, 0]
