"""Parts of attention with a twist: shared keys, uneven fused weights, rotations, biases, windows, channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, trick


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@trick((9, 24))
def multi_query() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        k, v = (part(x).unsqueeze(1).expand(b, 6, n, 8) for part in (net.k, net.v))
        y = F.scaled_dot_product_attention(_heads(net.q(x), 6), k, v)
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        {
            "q": nn.Linear(24, 48),
            "k": nn.Linear(24, 8),
            "v": nn.Linear(24, 8),
            "o": nn.Linear(48, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@trick((9, 24))
def multi_query_by_broadcast() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = _heads(net.q(x), 6), net.k(x)[:, None], net.v(x)[:, None]
        y = torch.softmax(q @ k.mT * 8**-0.5, -1) @ v
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        {
            "q": nn.Linear(24, 48),
            "k": nn.Linear(24, 8),
            "v": nn.Linear(24, 6),
            "o": nn.Linear(36, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@trick((9, 24))
def fused_with_a_smaller_value() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).split([24, 24, 12], -1)
        y = F.scaled_dot_product_attention(_heads(q, 3), _heads(k, 3), _heads(v, 3))
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net({"qkv": nn.Linear(24, 60), "o": nn.Linear(12, 20), "fc": nn.Linear(20, 10)}, forward)


@trick((9, 24))
def fused_within_each_head() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(-1, (3, 22)).transpose(1, 2).split([8, 8, 6], -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net({"qkv": nn.Linear(24, 66), "o": nn.Linear(18, 20), "fc": nn.Linear(20, 10)}, forward)


@trick((9, 24))
def one_weight_read_in_parts() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q = F.linear(x, net.w[:24], net.b[:24])
        k = F.linear(x, net.w[24:48], net.b[24:48])
        v = F.linear(x, net.w[48:], net.b[48:])
        y = F.scaled_dot_product_attention(_heads(q, 3), _heads(k, 3), _heads(v, 3))
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        {
            "w": nn.Parameter(torch.randn(72, 24)),
            "b": nn.Parameter(torch.randn(72)),
            "o": nn.Linear(24, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


def _angles(positions: int, count: int) -> Tensor:
    return torch.arange(positions)[:, None] / 10 ** (torch.arange(count) / count)[None]


@trick((9, 24))
def rotated_in_pairs() -> nn.Module:
    """Su et al. 2021, "RoFormer": neighbouring features are rotated together."""

    def turned(net: Net, x: Tensor) -> Tensor:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * net.cos + other * net.sin

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k = turned(net, _heads(net.q(x), 3)), turned(net, _heads(net.k(x), 3))
        y = F.scaled_dot_product_attention(q, k, _heads(net.v(x), 3))
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    angles = _angles(9, 4).repeat_interleave(2, -1)
    return Net(
        {
            **{name: nn.Linear(24, 24) for name in "qkvo"},
            "fc": nn.Linear(24, 10),
            "cos": angles.cos(),
            "sin": angles.sin(),
        },
        forward,
    )


@trick((9, 24))
def rotated_as_complex_numbers() -> nn.Module:
    def turned(net: Net, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * net.turn).flatten(-2)

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k = turned(net, _heads(net.q(x), 3)), turned(net, _heads(net.k(x), 3))
        y = F.scaled_dot_product_attention(q, k, _heads(net.v(x), 3))
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    angles = _angles(9, 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    return Net({**{name: nn.Linear(24, 24) for name in "qkvo"}, "fc": nn.Linear(24, 10), "turn": turn}, forward)


@trick((9, 24))
def rotated_in_part() -> nn.Module:
    def turned(net: Net, x: Tensor) -> Tensor:
        moved, kept = x[..., :4], x[..., 4:]
        first, second = moved.chunk(2, -1)
        return torch.cat([moved * net.cos + torch.cat([-second, first], -1) * net.sin, kept], -1)

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k = turned(net, _heads(net.q(x), 3)), turned(net, _heads(net.k(x), 3))
        y = F.scaled_dot_product_attention(q, k, _heads(net.v(x), 3))
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    angles = _angles(9, 2).repeat(1, 2)
    return Net(
        {
            **{name: nn.Linear(24, 24) for name in "qkvo"},
            "fc": nn.Linear(24, 10),
            "cos": angles.cos(),
            "sin": angles.sin(),
        },
        forward,
    )


@trick((9, 24))
def bias_of_each_distance() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = (_heads(part(x), 3) for part in (net.q, net.k, net.v))
        bias = net.bias(net.distance).permute(2, 0, 1)[None] - net.slopes * net.distance
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    distance = (torch.arange(9)[:, None] - torch.arange(9)[None]).abs()
    return Net(
        {
            **{name: nn.Linear(24, 24) for name in "qkvo"},
            "bias": nn.Embedding(9, 3),
            "slopes": torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1),
            "distance": distance,
            "fc": nn.Linear(24, 10),
        },
        forward,
    )


@trick((9, 24))
def heads_that_talk() -> nn.Module:
    """Shazeer et al. 2020, "Talking-Heads Attention"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = (_heads(part(x), 4) for part in (net.q, net.k, net.v))
        weights = net.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        y = net.after(weights).permute(0, 3, 1, 2) @ v
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        {
            **{name: nn.Linear(24, 24) for name in "qkvo"},
            "before": nn.Linear(4, 4),
            "after": nn.Linear(4, 4),
            "fc": nn.Linear(24, 10),
        },
        forward,
    )


@trick((9, 24))
def queries_of_its_own() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        latent = net.latent.expand(x.shape[0], -1, -1)
        k, v = net.kv(x).chunk(2, -1)
        y = F.scaled_dot_product_attention(_heads(net.q(latent), 3), _heads(k, 3), _heads(v, 3))
        y = latent + net.o(y.transpose(1, 2).flatten(2))
        return net.fc(y.flatten(1))

    return Net(
        {
            "latent": nn.Parameter(torch.randn(1, 4, 16)),
            "q": nn.Linear(16, 24),
            "kv": nn.Linear(24, 48),
            "o": nn.Linear(24, 16),
            "fc": nn.Linear(64, 10),
        },
        forward,
    )


@trick((9, 24), share=0.9)
def attention_between_channels() -> nn.Module:
    """El-Nouby et al. 2021, "XCiT": features attend to features, and share the attention of those that are left."""

    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * net.heat
        y = weights.softmax(-1) @ v
        return net.fc(net.o(y.permute(0, 3, 1, 2).flatten(2)).mean(1))

    return Net(
        {
            "qkv": nn.Linear(24, 72),
            "heat": nn.Parameter(torch.rand(4, 1, 1)),
            "o": nn.Linear(24, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@trick((8, 8, 12))
def windows_with_a_halo() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, kv = net.q(x), net.kv(x)
        q = q.view(b, 2, 4, 2, 4, 2, 8).permute(0, 5, 1, 3, 2, 4, 6).reshape(b * 2, 4, 16, 8)
        kv = F.pad(kv, (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4)
        kv = kv.reshape(b, 4, 2, 16, 36).permute(0, 2, 1, 4, 3).reshape(b * 2, 4, 36, 16)
        k, v = kv.split(8, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.view(b, 2, 2, 2, 4, 4, 8).permute(0, 2, 4, 3, 5, 1, 6).reshape(b, 8, 8, 16)
        return net.fc(net.o(y).mean((1, 2)))

    return Net(
        {"q": nn.Linear(12, 16), "kv": nn.Linear(12, 32), "o": nn.Linear(16, 20), "fc": nn.Linear(20, 10)}, forward
    )


@trick((9, 24))
def positions_by_slices_of_a_table() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        n = x.shape[1]
        y = net.embed(x) + net.table[:n] + net.rows[net.order[:n]]
        y = y + net.attention(y, y, y, need_weights=False)[0]
        return net.fc(net.out(y).mean(1))

    return Net(
        {
            "embed": nn.Linear(24, 16),
            "table": nn.Parameter(torch.randn(12, 16)),
            "rows": nn.Parameter(torch.randn(12, 16)),
            "order": torch.arange(12).flip(0),
            "attention": nn.MultiheadAttention(16, 2, batch_first=True),
            "out": nn.Linear(16, 16),
            "fc": nn.Linear(16, 10),
        },
        forward,
    )
