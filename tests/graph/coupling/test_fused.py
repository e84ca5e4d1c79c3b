"""Fused projections are taken apart only where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import analyse, check_equivalence
from mil_cli.graph.model import Model
from tests.graph.coupling.networks.base import Net

FEATURES, TOKENS = 24, 6


def attention(*, scaled_in_place: bool) -> Callable[[Net, Tensor], Tensor]:
    def forward(net: Net, x: Tensor) -> Tensor:
        parts = net.qkv(x).view(x.shape[0], TOKENS, 3, 4, 6).permute(2, 0, 3, 1, 4).contiguous()
        if scaled_in_place:
            parts[0] *= 0.5
        q, k, v = parts[0], parts[1], parts[2]
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return net.out(y.transpose(1, 2).flatten(2)).mean(1)

    return forward


def copied_before_a_write(net: Net, x: Tensor) -> Tensor:
    y = net.qkv(x)
    kept = y.clone().view(x.shape[0], TOKENS, 3, FEATURES)
    y.relu_()
    return net.out(kept.select(2, 1)).mean(1) + y.mean((1, 2))[:, None]


def halves_of_a_batch(net: Net, x: Tensor) -> Tensor:
    y = net.qkv(torch.cat([x, 2 * x])).view(2, -1, TOKENS, 3 * FEATURES)
    return net.out((y[0] * y[1]).unflatten(-1, (3, FEATURES)).mean(2)).mean(1)


def last_sample_by_index(net: Net, x: Tensor) -> Tensor:
    last = x[torch.tensor([-1])]
    return net.out(net.qkv(x + last).unflatten(-1, (3, FEATURES)).mean(2)).mean(1)


CASES: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "attention": (attention(scaled_in_place=False), True),
    "scaled_in_place": (attention(scaled_in_place=True), False),
    "copied_before_a_write": (copied_before_a_write, False),
    "halves_of_a_batch": (halves_of_a_batch, False),
    "last_sample_by_index": (last_sample_by_index, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_analysed_graph_computes_what_the_model_does(name: str) -> None:
    function, apart = CASES[name]
    torch.manual_seed(0)
    net = Net({"qkv": nn.Linear(FEATURES, 3 * FEATURES), "out": nn.Linear(FEATURES, 5)}, function)
    model = Model.capture(net.eval(), (torch.randn(2, TOKENS, FEATURES),))
    coupling = analyse(model)
    slices = [node for node in coupling.graph.graph.nodes if str(node.target) == "aten.slice.Tensor"]
    assert (len(slices) >= 3) == apart
    for batch in (1, 2, 16):
        calls = [((torch.randn(batch, TOKENS, FEATURES),), {})]
        assert check_equivalence(model, coupling, {}, model, calls).equivalent, batch
