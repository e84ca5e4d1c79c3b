"""Attention in all its forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, network


@network((9, 12))
def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return Net(
        {
            "embed": nn.Linear(12, 32),
            "body": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            "fc": nn.Linear(32, 10),
        },
        lambda net, x: net.fc(net.body(net.embed(x)).mean(1)),
    )


@network((9, 12))
def encoder_norm_first() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, norm_first=True, activation="gelu")
    return Net(
        {
            "embed": nn.Linear(12, 32),
            "body": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
            "fc": nn.Linear(32, 10),
        },
        lambda net, x: net.fc(net.body(net.embed(x.transpose(0, 1)))[0]),
    )


@network((9, 24))
def attention_with_weights() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y, weights = net.attention(x, x, x, need_weights=True)
        return net.fc(net.out(y).mean(1)) + weights.sum()

    return Net(
        {
            "attention": nn.MultiheadAttention(24, 3, batch_first=True),
            "out": nn.Linear(24, 16),
            "fc": nn.Linear(16, 10),
        },
        forward,
    )


@network((3, 16, 16))
def vision_transformer() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1) + net.position
        b, n, c = x.shape
        q, k, v = net.qkv(net.n1(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + net.project(y.transpose(1, 2).reshape(b, n, c))
        x = x + net.down(F.gelu(net.up(net.n2(x))))
        return net.fc(net.n3(x)[:, 0])

    return Net(
        {
            "patch": nn.Conv2d(3, 32, 4, stride=4),
            "token": nn.Parameter(torch.randn(1, 1, 32)),
            "position": nn.Parameter(torch.randn(1, 17, 32)),
            "qkv": nn.Linear(32, 96),
            "project": nn.Linear(32, 32),
            "n1": nn.LayerNorm(32),
            "n2": nn.LayerNorm(32),
            "n3": nn.LayerNorm(32),
            "up": nn.Linear(32, 64),
            "down": nn.Linear(64, 32),
            "fc": nn.Linear(32, 10),
        },
        forward,
    )


@network((9, 24))
def explicit_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part.view(b, n, 4, 6).transpose(1, 2) for part in (net.q(x), net.k(x), net.v(x)))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(6), -1)
        return net.fc(net.o((weights @ v).transpose(1, 2).reshape(b, n, 24)).mean(1))

    return Net({**{name: nn.Linear(24, 24) for name in "qkvo"}, "fc": nn.Linear(24, 10)}, forward)


@network((9, 24))
def grouped_query_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = net.q(x).view(b, n, 6, 8).transpose(1, 2)
        k, v = (part.view(b, n, 2, 8).transpose(1, 2) for part in (net.k(x), net.v(x)))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = net.o(y.transpose(1, 2).reshape(b, n, 48))
        return net.fc((F.silu(net.gate(x)) * net.up(x)).mean(1))

    return Net(
        {
            "q": nn.Linear(24, 48),
            "k": nn.Linear(24, 16),
            "v": nn.Linear(24, 16),
            "o": nn.Linear(48, 20),
            "gate": nn.Linear(20, 32),
            "up": nn.Linear(20, 32),
            "fc": nn.Linear(32, 10),
        },
        forward,
    )


@network((9, 24))
def enabled_gqa() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = net.q(x).view(b, n, 6, 8).transpose(1, 2)
        k, v = (part.view(b, n, 2, 8).transpose(1, 2) for part in (net.k(x), net.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return net.fc(net.o(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        {
            "q": nn.Linear(24, 48),
            "k": nn.Linear(24, 16),
            "v": nn.Linear(24, 16),
            "o": nn.Linear(48, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@network((9, 12), linear=False)
def linear_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = F.elu(net.q(x)) + 1, F.elu(net.k(x)) + 1, net.v(x)
        return net.fc((q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2))).mean(1))

    return Net(
        {"q": nn.Linear(12, 16), "k": nn.Linear(12, 16), "v": nn.Linear(12, 14), "fc": nn.Linear(14, 10)}, forward
    )


@network((8, 8, 12))
def shifted_windows() -> nn.Module:
    index = (torch.arange(16)[:, None] - torch.arange(16)[None]).reshape(-1) + 15

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        b = x.shape[0]
        y = torch.roll(net.norm(x), (-2, -2), (1, 2))
        y = y.view(b, 2, 4, 2, 4, 24).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 24)
        q, k, v = net.qkv(y).view(-1, 16, 3, 3, 8).permute(2, 0, 3, 1, 4)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        scores = scores + net.table[net.index].view(16, 16, 3).permute(2, 0, 1)
        y = net.project((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, 24))
        y = y.view(b, 2, 2, 4, 4, 24).permute(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, 24)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return net.fc(net.merge(x).mean((1, 2)))

    return Net(
        {
            "embed": nn.Linear(12, 24),
            "norm": nn.LayerNorm(24),
            "qkv": nn.Linear(24, 72),
            "project": nn.Linear(24, 24),
            "merge": nn.Linear(96, 32, bias=False),
            "fc": nn.Linear(32, 10),
            "index": index,
            "table": nn.Parameter(torch.randn(31, 3)),
        },
        forward,
    )


@network((9,))
def rotary_decoder() -> nn.Module:
    angles = torch.arange(9)[:, None] / 10 ** (torch.arange(4) / 4)[None]

    def turned(net: Net, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * net.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * net.sin

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.embed((x.abs() * 7).long() % 20)
        b, n, _ = y.shape
        z = normed(y, net.n1)
        q = turned(net, net.q(z).view(b, n, 4, 8).transpose(1, 2))
        k = turned(net, net.k(z).view(b, n, 2, 8).transpose(1, 2))
        v = net.v(z).view(b, n, 2, 8).transpose(1, 2)
        k, v = (part[:, :, None].expand(b, 2, 2, n, 8).reshape(b, 4, n, 8) for part in (k, v))
        mask = torch.full((n, n), float("-inf")).triu(1)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y + net.o(z.transpose(1, 2).reshape(b, n, -1))
        z = F.rms_norm(y, (24,), net.n2)
        return F.linear(y + net.down(F.silu(net.gate(z)) * net.up(z)), net.embed.weight)

    return Net(
        {
            "embed": nn.Embedding(20, 24),
            "q": nn.Linear(24, 32, bias=False),
            "k": nn.Linear(24, 16, bias=False),
            "v": nn.Linear(24, 16, bias=False),
            "o": nn.Linear(32, 24, bias=False),
            "gate": nn.Linear(24, 40),
            "up": nn.Linear(24, 40),
            "down": nn.Linear(40, 24),
            "n1": nn.Parameter(torch.ones(24)),
            "n2": nn.Parameter(torch.ones(24)),
            "cos": torch.cat([angles, angles], -1).cos(),
            "sin": torch.cat([angles, angles], -1).sin(),
        },
        forward,
    )
