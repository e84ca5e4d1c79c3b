"""Convolutional networks: residuals, concatenations, groups, norms, skips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled


@network()
def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        conv(16, 24),
        nn.Hardswish(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


@network()
def flatten_then_linear() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 10)
    )


@network()
def residual() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.b0(net.c0(x)))
        x = F.relu(x + net.b2(net.c2(F.relu(net.b1(net.c1(x))))))
        x = F.relu(net.short(x) + net.b3(net.c3(x)))
        return net.fc(pooled(x))

    return Net(
        {
            "c0": conv(3, 16),
            "b0": nn.BatchNorm2d(16),
            "c1": conv(16, 24),
            "b1": nn.BatchNorm2d(24),
            "c2": conv(24, 16),
            "b2": nn.BatchNorm2d(16),
            "c3": conv(16, 32, stride=2),
            "b3": nn.BatchNorm2d(32),
            "short": nn.Conv2d(16, 32, 1, stride=2),
            "fc": nn.Linear(32, 10),
        },
        forward,
    )


@network()
def dense_concat() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        b = F.relu(net.b(a))
        c = net.c(net.norm(torch.cat([a, b], 1)))
        return net.fc(pooled(torch.cat([c, a, c * 2], 1)))

    return Net(
        {"a": conv(3, 8), "b": conv(8, 12), "norm": nn.BatchNorm2d(20), "c": conv(20, 6), "fc": nn.Linear(20, 10)},
        forward,
    )


@network()
def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 16),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        conv(16, 16, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


@network()
def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(), conv(16, 12), nn.Flatten(), nn.Linear(12 * 64, 10)
    )


@network()
def grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 16),
        nn.ReLU(),
        conv(16, 24, groups=4),
        nn.ReLU(),
        conv(24, 12, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


@network()
def grouped_transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), nn.ReLU(), conv(24, 3)
    )


@network()
def u_net() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        b = F.relu(net.b(F.max_pool2d(a, 2)))
        c = F.relu(net.c(F.max_pool2d(b, 2)))
        d = F.relu(net.d(torch.cat([net.up1(c), b], 1)))
        e = F.interpolate(d, scale_factor=2.0, mode="bilinear", align_corners=False)
        return net.out(torch.cat([net.e(e), a], 1))

    return Net(
        {
            "a": conv(3, 8),
            "b": conv(8, 12),
            "c": conv(12, 16),
            "up1": nn.ConvTranspose2d(16, 10, 2, stride=2),
            "d": conv(22, 12),
            "e": conv(12, 8),
            "out": nn.Conv2d(16, 2, 1),
        },
        forward,
    )


@network()
def group_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 16),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        conv(16, 12),
        nn.GroupNorm(12, 12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 64, 10),
    )


@network()
def instance_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.InstanceNorm2d(12, affine=True), nn.ReLU(), conv(12, 6), nn.Flatten(), nn.Linear(6 * 64, 10)
    )


@network()
def shared_convolution() -> nn.Module:
    return Net(
        {"a": conv(3, 8), "b": conv(8, 8), "fc": nn.Linear(8, 10)},
        lambda net, x: net.fc(pooled(net.b(F.relu(net.b(F.relu(net.a(x))))))),
    )


@network()
def video() -> nn.Module:
    return Net(
        {"a": nn.Conv3d(1, 8, 3, padding=1), "n": nn.BatchNorm3d(8), "b": nn.Conv3d(8, 6, 1), "fc": nn.Linear(6, 10)},
        lambda net, x: net.fc(net.b(F.relu(net.n(net.a(x[:, None])))).mean((2, 3, 4))),
    )


@network((4, 16))
def sound() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 12, 3),
        nn.BatchNorm1d(12),
        nn.GELU(),
        nn.Conv1d(12, 8, 3, groups=4),
        nn.ConvTranspose1d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(6 * 13, 10),
    )


@network()
def nested_residuals() -> nn.Module:
    """Two outer branches, each around two inner ones."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for block in ("a", "b"):
            y = getattr(net, f"{block}in")(x)
            y = y + F.relu(getattr(net, f"{block}1")(y))
            y = y + F.relu(getattr(net, f"{block}2")(y))
            x = x + getattr(net, f"{block}out")(y)
        return net.fc(pooled(x))

    convs = {f"{block}{name}": conv(8, 8) for block in "ab" for name in ("in", "1", "2", "out")}
    return Net({"stem": conv(3, 8), **convs, "fc": nn.Linear(8, 10)}, forward)


@network()
def a_branch_that_begins_with_a_branch() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        for block in ("a", "b"):
            y = x + F.relu(getattr(net, f"{block}1")(x))
            x = x + getattr(net, f"{block}out")(F.relu(y))
        return net.fc(pooled(x))

    convs = {f"{block}{name}": conv(8, 8) for block in "ab" for name in ("1", "out")}
    return Net({"stem": conv(3, 8), **convs, "fc": nn.Linear(8, 10)}, forward)
