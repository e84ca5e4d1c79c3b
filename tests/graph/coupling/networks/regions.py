"""Sub-graphs: autocast, no-grad, branches, loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, network, trick


@network((9, 12))
def autocast_region() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        with torch.autocast("cpu", enabled=False):
            y = net.b(x.float())
        return net.fc((x + y).mean(1))

    return Net({"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "fc": nn.Linear(16, 10)}, forward)


@trick((9, 12))
def autocast_to_half_precision() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net.b(x)
            y = net.c(F.layer_norm(F.gelu(y), (16,)))
        return net.fc((x + y.float()).mean(1))

    return Net(
        {"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16), "fc": nn.Linear(16, 10)}, forward
    )


@trick((9, 12))
def without_gradient() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        with torch.no_grad():
            scale = net.a(x).abs().mean(1, keepdim=True)
            y_mean = (y * scale).mean()
        return net.fc(net.b(y / (scale + 1)).mean(1)) + y_mean

    return Net({"a": nn.Linear(12, 16), "b": nn.Linear(16, 14), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12))
def without_gradient_in_autocast() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = net.b(y)
            with torch.no_grad():
                scale = net.b(y).abs().mean((1, 2), keepdim=True)
            z = z / (scale + 1)
        return net.fc(z.float().mean(1))

    return Net({"a": nn.Linear(12, 16), "b": nn.Linear(16, 14), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12), share=0.3, frozen="cond", counted=False)
def one_of_two_branches() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        if torch.compiler.is_exporting():
            y = torch.cond(y.sum() > 0, lambda z: net.b(z) * 2, lambda z: net.c(z), (y,))  # frozen
        else:
            y = net.b(y) * 2 if y.sum() > 0 else net.c(y)
        return net.fc(net.e(F.relu(net.d(y))).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 8),
            "b": nn.Linear(8, 8),
            "c": nn.Linear(8, 8),
            "d": nn.Linear(8, 20),
            "e": nn.Linear(20, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((9, 12), share=0.3, frozen="while_loop", counted=False)
def a_loop() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        if torch.compiler.is_exporting():
            start = (torch.tensor(0), y)
            y = torch.while_loop(lambda i, z: i < 3, lambda i, z: (i + 1, torch.tanh(net.b(z))), start)[1]  # frozen
        else:
            for _ in range(3):
                y = torch.tanh(net.b(y))
        return net.fc(net.e(F.relu(net.d(y))).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 8),
            "b": nn.Linear(8, 8),
            "d": nn.Linear(8, 20),
            "e": nn.Linear(20, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )
