"""Views and rearrangements of channels: shuffles, slices, indices, padding, concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled, trick


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
def stacked() -> nn.Module:
    return Net(
        {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 6), "fc": nn.Linear(6, 10)},
        lambda net, x: net.fc(pooled(net.c(torch.stack([net.a(x), net.b(x)], 1).sum(1)))),
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
def two_views_of_one_axis() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        n = x.shape[0]
        first, second = x.view(n, 4, 6, 8, 8).sum(2), x.view(n, 6, 4, 8, 8).mean(2)
        return net.fc(pooled(torch.cat([net.b(first), net.c(second)], 1)))

    return Net({"a": conv(3, 24), "b": conv(4, 6), "c": conv(6, 6), "fc": nn.Linear(12, 10)}, forward)


@network()
def viewed_as_another() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        y = a.flatten(2).view_as(b) * net.gate.view(1, -1, 1, 1).expand_as(b)
        return net.fc(pooled(y + b.reshape_as(a)))

    return Net(
        {"a": conv(3, 8), "b": conv(3, 8), "gate": nn.Parameter(torch.randn(8)), "fc": nn.Linear(8, 10)}, forward
    )


@trick()
def interleaved_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        both = torch.stack([net.a(x), net.b(x)], 2).flatten(1, 2)
        return net.fc(pooled(net.c(F.relu(both))))

    return Net({"a": conv(3, 8), "b": conv(3, 8), "c": conv(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def shuffled_in_uneven_groups() -> nn.Module:
    """Two shuffles that do not undo each other, one of them over three axes."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        n = x.shape[0]
        x = x.view(n, 3, 4, 8, 8).permute(0, 2, 1, 3, 4).flatten(1, 2)
        x = net.b(x).reshape(n, 2, 3, 2, 8, 8).permute(0, 3, 1, 2, 4, 5).reshape(n, -1, 8, 8)
        return net.fc(pooled(net.c(F.relu(x))))

    return Net({"a": conv(3, 12), "b": conv(12, 12, groups=12), "c": conv(12, 10), "fc": nn.Linear(10, 10)}, forward)


@trick()
def shuffled_between_grouped_convolutions() -> nn.Module:
    return nn.Sequential(
        conv(3, 12),
        nn.ReLU(),
        conv(12, 24, groups=3),
        nn.ChannelShuffle(3),
        conv(24, 12, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 64, 10),
    )


@trick()
def shuffled_pixels_then_groups() -> nn.Module:
    return nn.Sequential(
        conv(3, 32),
        nn.ReLU(),
        nn.PixelShuffle(2),
        conv(8, 12, groups=2),
        nn.PixelUnshuffle(2),
        conv(48, 12, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


@trick()
def thrice_in_one_concatenation() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.fc(pooled(net.b(torch.cat([x, x.flip(1), x[:, ::2], x], 1))))

    return Net({"a": conv(3, 8), "b": conv(28, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def repeated_beside_itself() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        x = x.repeat_interleave(3, 1) + x.unsqueeze(1).expand(-1, 3, -1, -1, -1).reshape(-1, 24, 8, 8)
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "b": conv(24, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def tiled_with_a_new_axis() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = pooled(F.relu(net.a(x)))
        return net.fc(net.b(x.repeat(2, 1, 3).permute(1, 0, 2).flatten(1)))

    return Net({"a": conv(3, 8), "b": nn.Linear(48, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def squeezed_and_moved() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(net.a(x)), (1, 4)).squeeze(2)
        x = x.movedim(1, -1).swapaxes(0, 1).unsqueeze(2)
        return net.fc(net.b(x).squeeze().mean(0))

    return Net({"a": conv(3, 16), "b": nn.Linear(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def space_into_channels_by_slices() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        x = torch.cat([x[..., i::2, j::2] for i in range(2) for j in range(2)], 1)
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "b": conv(32, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def windows_folded_back() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        columns = F.unfold(F.relu(net.a(x)), 2, stride=2)
        columns = net.b(columns.transpose(1, 2)).transpose(1, 2)
        return net.fc(pooled(net.c(F.fold(columns, (8, 8), 2, stride=2))))

    return Net({"a": conv(3, 6), "b": nn.Linear(24, 32), "c": conv(8, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def flattened_in_another_order() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        first, second = x.permute(0, 2, 3, 1).flatten(1), x.flatten(1)
        return net.fc(net.b(first) + net.c(second))

    return Net(
        {"a": conv(3, 8, stride=2), "b": nn.Linear(128, 12), "c": nn.Linear(128, 12), "fc": nn.Linear(12, 10)}, forward
    )
