"""Sub-graphs: autocast, no-grad, branches, loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled, trick


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


@trick((9, 12), counted=False)
def one_of_two_branches() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        if torch.compiler.is_exporting():
            y = torch.cond(y.sum() > 0, lambda z: net.b(z) * 2, lambda z: net.c(z), (y,))
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


@trick(counted=False)
def a_residual_block_in_a_branch() -> nn.Module:
    def block(net: Net, z: Tensor) -> Tensor:
        return z + net.c(F.relu(net.norm(net.b(z))))

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        wanted = y.mean() > 0.3
        if torch.compiler.is_exporting():
            y = torch.cond(wanted, lambda z: block(net, z), lambda z: z.clone(), (y,))
        else:
            y = block(net, y) if wanted else y
        return net.fc(pooled(F.relu(net.d(y))))

    parts = {"a": conv(3, 8), "b": conv(8, 12), "norm": nn.BatchNorm2d(12), "c": conv(12, 8), "d": conv(8, 16)}
    return Net({**parts, "fc": nn.Linear(16, 10)}, forward)


@trick(counted=False)
def one_of_two_convolutions() -> nn.Module:
    def wide(net: Net, z: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = z.shape
        z = F.relu(net.wide(z))
        return z.view(batch, 4, channels // 4, height, width).mean(2), z

    def narrow(net: Net, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = net.narrow(z).chunk(2, 1)
        return z[:, :4] * 2, torch.cat([second, first], 1)

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        wanted = y.mean() < 0.3
        if torch.compiler.is_exporting():
            few, many = torch.cond(wanted, lambda z: wide(net, z), lambda z: narrow(net, z), (y,))
        else:
            few, many = wide(net, y) if wanted else narrow(net, y)
        return net.fc(pooled(F.relu(net.d(many)))) + net.few(pooled(few))

    parts = {"a": conv(3, 8), "wide": conv(8, 8), "narrow": conv(8, 8, 1), "d": conv(8, 16)}
    return Net({**parts, "few": nn.Linear(4, 10), "fc": nn.Linear(16, 10)}, forward)


@trick((9, 12), counted=False)
def a_norm_in_a_branch() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        wanted = y.sum() > 0
        if torch.compiler.is_exporting():
            y = torch.cond(wanted, lambda z: net.norm(z) * 2, lambda z: torch.tanh(z), (y,))
        else:
            y = net.norm(y) * 2 if wanted else torch.tanh(y)
        return net.fc(net.b(y).relu().mean(1))

    parts = {"a": nn.Linear(12, 16), "norm": nn.LayerNorm(16), "b": nn.Linear(16, 14), "fc": nn.Linear(14, 10)}
    return Net(parts, forward)


@trick((9, 12), counted=False)
def branches_in_a_branch() -> nn.Module:
    def either(net: Net, z: Tensor) -> Tensor:
        wanted = z.mean() > 0.1
        if torch.compiler.is_exporting():
            return torch.cond(wanted, lambda v: net.c(v) + net.scale, lambda v: net.d(v), (z,))
        return net.c(z) + net.scale if wanted else net.d(z)

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        wanted = y.sum() > 0
        if torch.compiler.is_exporting():
            y = torch.cond(wanted, lambda z: either(net, F.relu(net.b(z))), lambda z: net.e(z), (y,))
        else:
            y = either(net, F.relu(net.b(y))) if wanted else net.e(y)
        return net.fc(F.relu(y).mean(1))

    parts: dict[str, nn.Module | nn.Parameter | Tensor] = {
        "a": nn.Linear(12, 8),
        "b": nn.Linear(8, 20),
        "c": nn.Linear(20, 14),
        "d": nn.Linear(20, 14),
        "e": nn.Linear(8, 14),
        "scale": torch.rand(14),
        "fc": nn.Linear(14, 10),
    }
    return Net(parts, forward)


@trick((9, 12), counted=False)
def attention_or_half_precision_in_a_branch() -> nn.Module:
    def heads(net: Net, z: Tensor) -> Tensor:
        batch, length, width = z.shape
        q, k, v = (part.view(batch, length, 2, width // 2).transpose(1, 2) for part in net.qkv(z).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return z + net.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def half(net: Net, z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (net.b(z) * 2).float()

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        wanted = y.sum() > 0
        if torch.compiler.is_exporting():
            y = torch.cond(wanted, lambda z: heads(net, z), lambda z: half(net, z), (y,))
        else:
            y = heads(net, y) if wanted else half(net, y)
        return net.fc(y.mean(1))

    parts = {"a": nn.Linear(12, 8), "qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    return Net({**parts, "fc": nn.Linear(8, 10)}, forward)
