"""Recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, network, trick


@network((4, 12), counted=False)
def long_short_term_memory() -> nn.Module:
    return Net(
        {
            "a": nn.Linear(12, 10),
            "body": nn.LSTM(10, 14, 2, bidirectional=True, batch_first=True),
            "fc": nn.Linear(28, 10),
        },
        lambda net, x: net.fc(net.body(net.a(x))[0][:, -1]),
    )


@network((4, 12), counted=False)
def gated_recurrent() -> nn.Module:
    return Net(
        {"body": nn.GRU(12, 14, batch_first=True), "fc": nn.Linear(14, 10)}, lambda net, x: net.fc(net.body(x)[1][0])
    )


@trick((4, 12), counted=False)
def recurrent_in_both_directions() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, h = net.body(net.a(x))
        return net.fc(torch.cat([y.mean(1), h[-1], h[-2]], -1))

    return Net(
        {
            "a": nn.Linear(12, 10),
            "body": nn.GRU(10, 14, 2, bidirectional=True, batch_first=True),
            "fc": nn.Linear(56, 10),
        },
        forward,
    )


@trick((4, 12), counted=False)
def states_of_a_recurrence() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        _, (h, c) = net.body(x)
        return net.fc(torch.tanh(h[0]) + c[1])

    return Net({"body": nn.LSTM(12, 14, 2, batch_first=True), "fc": nn.Linear(14, 10)}, forward)


@trick((4, 12), share=0.0, frozen="projections", counted=False)
def projected_recurrence() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, _ = net.body(x)  # frozen
        return net.fc(y[:, -1])

    return Net({"body": nn.LSTM(12, 14, proj_size=6, batch_first=True), "fc": nn.Linear(6, 10)}, forward)


@trick((4, 12))
def recurrence_written_out() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 14)
        for step in x.unbind(1):
            i, f, g, o = (net.given(step) + net.before(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return net.fc(h)

    return Net({"given": nn.Linear(12, 56), "before": nn.Linear(14, 56), "fc": nn.Linear(14, 10)}, forward)


@trick((4, 12), counted=False)
def recurrent_cells() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 14)
        state = (x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16))
        for step in x.unbind(1):
            h = net.gru(step, h)
            state = net.lstm(h, state)
        return net.fc(state[0])

    return Net({"gru": nn.GRUCell(12, 14), "lstm": nn.LSTMCell(14, 16), "fc": nn.Linear(16, 10)}, forward)
