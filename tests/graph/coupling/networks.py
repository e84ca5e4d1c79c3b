"""One small network for each kind of structure that an analysis meets, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A network written as a constructor that returns its parts and a function of (parts, input)."""

    def __init__(self, parts: dict[str, nn.Module | nn.Parameter | Tensor], function: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


IMAGE = (3, 8, 8)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {}


def network(shape: tuple[int, ...] = IMAGE) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[build.__name__] = lambda: (build(), shape)
        return build

    return register


def conv(inputs: int, outputs: int, window: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, window, padding=window // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


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
def channel_shuffle() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, F.relu(net.b(right))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        return net.fc(pooled(net.c(torch.cat([left, right * 2], 1))))

    return Net({"a": conv(3, 16), "b": conv(8, 8), "c": conv(16, 12), "fc": nn.Linear(12, 10)}, forward)


@network()
def channel_shuffle_module() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.ReLU(), nn.ChannelShuffle(3), conv(12, 12, groups=3), nn.Flatten(), nn.Linear(12 * 64, 10)
    )


@network()
def squeeze_excite() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.silu(net.a(x))
        gate = torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))))
        return net.fc(pooled(net.b(x * gate)))

    return Net(
        {
            "a": conv(3, 16),
            "down": nn.Conv2d(16, 6, 1),
            "up": nn.Conv2d(6, 16, 1),
            "b": conv(16, 8),
            "fc": nn.Linear(8, 10),
        },
        forward,
    )


@network()
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(
        conv(3, 12),
        nn.ReLU(),
        conv(12, 32),
        nn.PixelShuffle(2),
        nn.PReLU(8),
        conv(8, 12),
        nn.PixelUnshuffle(2),
        conv(48, 3),
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
def glu_gate() -> nn.Module:
    return nn.Sequential(conv(3, 24), nn.GLU(1), conv(12, 8), nn.Flatten(), nn.Linear(8 * 64, 10))


@network()
def padded_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = net.a(x)
        return net.fc(pooled(net.c(F.relu(F.pad(a, (0, 0, 0, 0, 2, 4)) + net.b(x)))))

    return Net({"a": conv(3, 8), "b": conv(3, 14), "c": conv(14, 6), "fc": nn.Linear(6, 10)}, forward)


@network()
def strided_slices() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.fc(pooled(net.b(x[:, ::2] + x[:, 1::2]) * x[:, 3:9]))

    return Net({"a": conv(3, 12), "b": conv(6, 6), "fc": nn.Linear(6, 10)}, forward)


@network()
def permuted_by_index() -> nn.Module:
    order = torch.tensor([3, 0, 2, 1, 7, 6, 5, 4])
    return Net(
        {"a": conv(3, 8), "b": conv(8, 6), "fc": nn.Linear(6, 10), "order": order},
        lambda net, x: net.fc(pooled(net.b(F.relu(net.a(x))[:, net.order]).flip(1).roll(2, 1))),
    )


@network()
def in_place_on_a_slice() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).clone()
        x[:, 2:6].mul_(2)
        x[:, :4].relu_()
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "b": conv(8, 6), "fc": nn.Linear(6, 10)}, forward)


@network()
def shared_convolution() -> nn.Module:
    return Net(
        {"a": conv(3, 8), "b": conv(8, 8), "fc": nn.Linear(8, 10)},
        lambda net, x: net.fc(pooled(net.b(F.relu(net.b(F.relu(net.a(x))))))),
    )


@network()
def partly_added() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        return net.fc(pooled(torch.cat([a[:, :8] + b, a[:, 8:]], 1)))

    return Net({"a": conv(3, 12), "b": conv(3, 8), "fc": nn.Linear(12, 10)}, forward)


@network()
def unfolded() -> nn.Module:
    return Net(
        {"a": conv(3, 6), "b": nn.Linear(6 * 9, 12), "fc": nn.Linear(12, 10)},
        lambda net, x: net.fc(net.b(F.unfold(F.relu(net.a(x)), 3).transpose(1, 2)).amax(1)),
    )


@network()
def weight_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(conv(3, 12)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(conv(12, 8)),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )


@network()
def standardised_weight() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        w = net.w.reshape(1, 12, -1)
        w = F.batch_norm(w, None, None, training=True).reshape(net.w.shape)
        return net.fc(pooled(net.b(F.relu(F.conv2d(x, w, padding=1)))))

    return Net({"w": nn.Parameter(torch.randn(12, 3, 3, 3)), "b": conv(12, 8), "fc": nn.Linear(8, 10)}, forward)


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


@network((9, 12))
def einsum() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(torch.einsum("bnc,dc->bnd", F.relu(net.a(x)), net.w).mean(1))

    return Net({"a": nn.Linear(12, 16), "w": nn.Parameter(torch.randn(14, 16)), "fc": nn.Linear(14, 10)}, forward)


@network((9, 12))
def linear_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = F.elu(net.q(x)) + 1, F.elu(net.k(x)) + 1, net.v(x)
        return net.fc((q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2))).mean(1))

    return Net(
        {"q": nn.Linear(12, 16), "k": nn.Linear(12, 16), "v": nn.Linear(12, 14), "fc": nn.Linear(14, 10)}, forward
    )


@network((4, 12))
def long_short_term_memory() -> nn.Module:
    return Net(
        {
            "a": nn.Linear(12, 10),
            "body": nn.LSTM(10, 14, 2, bidirectional=True, batch_first=True),
            "fc": nn.Linear(28, 10),
        },
        lambda net, x: net.fc(net.body(net.a(x))[0][:, -1]),
    )


@network((4, 12))
def gated_recurrent() -> nn.Module:
    return Net(
        {"body": nn.GRU(12, 14, batch_first=True), "fc": nn.Linear(14, 10)}, lambda net, x: net.fc(net.body(x)[1][0])
    )


@network((9,))
def tied_embedding() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.embed((x.abs() * 7).long() % 20)
        return F.linear(y + net.down(F.relu(net.up(y))), net.embed.weight)

    return Net({"embed": nn.Embedding(20, 16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}, forward)


@network()
def stacked() -> nn.Module:
    return Net(
        {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 6), "fc": nn.Linear(6, 10)},
        lambda net, x: net.fc(pooled(net.c(torch.stack([net.a(x), net.b(x)], 1).sum(1)))),
    )


@network()
def maxout() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.fc(pooled(net.b(x.view(x.shape[0], 6, 4, 8, 8).amax(2))))

    return Net({"a": conv(3, 24), "b": conv(6, 8), "fc": nn.Linear(8, 10)}, forward)


@network()
def unit_length() -> nn.Module:
    return Net(
        {"a": conv(3, 12), "fc": nn.Linear(12, 10)},
        lambda net, x: net.fc(F.normalize(pooled(net.a(x)), dim=1)),
    )


@network()
def repeated() -> nn.Module:
    return Net(
        {"a": conv(3, 8), "b": conv(16, 6), "fc": nn.Linear(6, 10)},
        lambda net, x: net.fc(pooled(net.b(net.a(x).repeat(1, 2, 1, 1)))),
    )


@network()
def concatenated_with_itself() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.fc(pooled(net.b(torch.cat([x, F.relu(-x)], 1))))

    return Net({"a": conv(3, 8), "b": conv(16, 6), "fc": nn.Linear(6, 10)}, forward)


@network()
def spatial_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return net.fc(pooled(net.b(x * torch.sigmoid(net.gate(gate)))))

    return Net({"a": conv(3, 12), "gate": conv(2, 1), "b": conv(12, 6), "fc": nn.Linear(6, 10)}, forward)


@network()
def two_views_of_one_axis() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        n = x.shape[0]
        first, second = x.view(n, 4, 6, 8, 8).sum(2), x.view(n, 6, 4, 8, 8).mean(2)
        return net.fc(pooled(torch.cat([net.b(first), net.c(second)], 1)))

    return Net({"a": conv(3, 24), "b": conv(4, 6), "c": conv(6, 6), "fc": nn.Linear(12, 10)}, forward)


@network()
def selective_kernels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        both = torch.stack([net.a(x), net.b(x)], 1)
        gate = net.up(F.relu(net.down(both.sum(1).mean((2, 3), keepdim=True))))
        weights = torch.softmax(gate.view(-1, 2, 8, 1, 1), 1)
        return net.fc(pooled((both * weights).sum(1)))

    return Net(
        {
            "a": conv(3, 8),
            "b": conv(3, 8),
            "down": nn.Conv2d(8, 6, 1),
            "up": nn.Conv2d(6, 16, 1),
            "fc": nn.Linear(8, 10),
        },
        forward,
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


@network((9, 12))
def autocast_region() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        with torch.autocast("cpu", enabled=False):
            y = net.b(x.float())
        return net.fc((x + y).mean(1))

    return Net({"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "fc": nn.Linear(16, 10)}, forward)


@network()
def viewed_as_another() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        y = a.flatten(2).view_as(b) * net.gate.view(1, -1, 1, 1).expand_as(b)
        return net.fc(pooled(y + b.reshape_as(a)))

    return Net(
        {"a": conv(3, 8), "b": conv(3, 8), "gate": nn.Parameter(torch.randn(8)), "fc": nn.Linear(8, 10)}, forward
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
