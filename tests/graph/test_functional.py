"""Products with weights in every form that users write, before and after."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name


class Products(nn.Module):
    """Square weights, so that a wrong transposition is no error of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 6) for _ in range(9))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        x = torch.tanh((x @ w[0].T) @ w[1].t())
        x = torch.mm(torch.tanh(x @ w[2].transpose(0, -1)), w[3].permute(1, 0))
        x = torch.tanh(x @ w[4].mT) @ w[5].permute(0, 1)  # the last swaps nothing
        x = torch.addmm(self.bias, torch.addmm(self.bias, x, w[6]), w[7].T)
        return torch.addmm(self.bias, x.mT @ x, w[8], alpha=2)


def test_products_with_weights_become_plain_ones_with_the_same_results() -> None:
    torch.manual_seed(0)
    net = Model.capture(Products().eval(), (torch.randn(6, 6),), dynamic={})
    x = torch.randn(6, 6)
    expected = net(x)
    make_functional(net.graph)
    torch.testing.assert_close(net(x), expected)
    names = Counter(op_name(node) for node in calls(net.graph))
    assert names["linear"] == 7
    assert (names["matmul"], names["mm"], names["addmm"]) == (2, 0, 1)
    assert (names["permute"], names["mT"], names["t"], names["numpy_T"], names["transpose"]) == (1, 1, 0, 0, 0)
