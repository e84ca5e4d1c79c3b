"""Views that mix the batch with channels, heads or time, and sizes that equal the batch by accident."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, pooled, trick


@trick((9, 24))
def heads_in_the_batch() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, 4, 6).transpose(1, 2).reshape(b * 4, n, 6) for part in (net.q, net.k, net.v))
        scores = torch.baddbmm(net.bias, q, k.transpose(1, 2), alpha=6**-0.5)
        y = torch.bmm(scores.softmax(-1), v)
        return net.fc(net.o(y.view(b, 4, n, 6).transpose(1, 2).reshape(b, n, 24)).mean(1))

    return Net(
        {**{name: nn.Linear(24, 24) for name in "qkvo"}, "bias": torch.randn(9, 9), "fc": nn.Linear(24, 10)}, forward
    )


@trick((9, 24))
def heads_before_the_batch() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (torch.cat(part(x).chunk(3, -1), 0) for part in (net.q, net.k, net.v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return net.fc(net.o(torch.cat(y.split(b, 0), -1)).mean(1))

    return Net({**{name: nn.Linear(24, 24) for name in "qkvo"}, "fc": nn.Linear(24, 10)}, forward)


@trick((9, 24))
def as_many_heads_as_samples() -> nn.Module:
    """Five heads, and the analysis may run five samples."""

    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, 5, 6).permute(2, 0, 1, 3).reshape(5 * b, n, 6) for part in (net.q, net.k, net.v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return net.fc(net.o(y.view(5, b, n, 6).permute(1, 2, 0, 3).reshape(b, n, 30)).mean(1))

    return Net(
        {**{name: nn.Linear(24, 30) for name in "qkv"}, "o": nn.Linear(30, 24), "fc": nn.Linear(24, 10)}, forward
    )


@trick((12,))
def samples_taken_for_channels() -> nn.Module:
    """Reshaped where it should be transposed: only for five samples do the axes fall together."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x)).view(-1, 4, 5).permute(2, 0, 1).contiguous()
        y = y.view(-1, 5, 4)
        return net.fc(net.b(y).sum(1))

    return Net({"a": nn.Linear(12, 20), "b": nn.Linear(4, 16), "fc": nn.Linear(16, 10)}, forward)


@trick((12,))
def rows_across_samples() -> nn.Module:
    """Five rows of all samples' features: only for five samples is a row a sample, and for others the
    channels of a row come in fours."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        rows = y.reshape(5, -1)
        return net.fc(y) * rows.tanh().sum(1).mean()

    return Net({"a": nn.Linear(12, 20), "fc": nn.Linear(20, 10)}, forward)


@trick()
def channels_in_the_batch() -> nn.Module:
    """Every channel is filtered by the same four filters."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        b, c, h, w = x.shape
        y = net.b(x.reshape(b * c, 1, h, w)).view(b, c * 4, h, w)
        return net.fc(pooled(net.c(F.relu(y))))

    return Net({"a": conv(3, 6), "b": conv(1, 4), "c": conv(24, 12), "fc": nn.Linear(12, 10)}, forward)


@trick((4, 3, 8, 8))
def frames_in_the_batch() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        y = F.relu(net.a(x.flatten(0, 1))).mean((2, 3)).view(b, t, 16)
        y = net.b(y.transpose(1, 2))
        return net.fc(y.flatten(1))

    return Net({"a": conv(3, 16), "b": nn.Conv1d(16, 8, 3, padding=1), "fc": nn.Linear(32, 10)}, forward)


@trick((8, 8, 12))
def attention_along_each_axis() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        for name in ("rows", "columns"):
            b, h, w, c = x.shape
            q, k, v = getattr(net, name)(x).view(b * h, w, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)
            x = (x + y).transpose(1, 2)
        return net.fc(x.mean((1, 2)))

    return Net(
        {"embed": nn.Linear(12, 16), "rows": nn.Linear(16, 48), "columns": nn.Linear(16, 48), "fc": nn.Linear(16, 10)},
        forward,
    )


@trick(counted=False)
def filters_of_each_sample() -> nn.Module:
    """Yang et al. 2019, "CondConv": a grouped convolution with as many groups as samples."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        b, c, h, w = x.shape
        routing = torch.sigmoid(net.route(pooled(x)))
        weight = torch.einsum("be,eoihw->boihw", routing, net.experts).reshape(b * 12, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return net.fc(pooled(net.b(F.relu(y.view(b, 12, h, w)))))

    return Net(
        {
            "a": conv(3, 8),
            "route": nn.Linear(8, 3),
            "experts": nn.Parameter(torch.randn(3, 12, 8, 3, 3)),
            "b": conv(12, 12),
            "fc": nn.Linear(12, 10),
        },
        forward,
    )


@trick()
def one_filter_for_each_channel_of_each_sample() -> nn.Module:
    """Jia et al. 2016, "Dynamic Filter Networks": as many groups as samples times channels."""

    def forward(net: Net, x: Tensor) -> Tensor:
        features = F.relu(net.a(x))
        b, c, h, w = features.shape
        filters = net.filters(pooled(x)).view(b * c, 1, 3, 3)
        y = F.conv2d(features.view(1, b * c, h, w), filters, padding=1, groups=b * c)
        return net.fc(pooled(y.view(b, c, h, w)))

    return Net({"a": conv(3, 8), "filters": nn.Linear(3, 8 * 9), "fc": nn.Linear(8, 10)}, forward)
