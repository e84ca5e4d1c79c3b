"""Channels taken by their position: uneven parts, steps, shifts, indices, masks, order by value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, pooled, trick


@trick()
def uneven_split() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        first, second, third = F.relu(net.a(x)).split([3, 5, 8], 1)
        return net.fc(pooled(net.b(torch.cat([third, first], 1)) + net.c(second)))

    return Net({"a": conv(3, 16), "b": conv(11, 12), "c": conv(5, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def chunks_of_which_the_last_is_smaller() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        first, second, last = net.a(x).chunk(3, 1)
        return net.fc(pooled(net.b(first * torch.tanh(second)) + net.c(last)))

    return Net({"a": conv(3, 16), "b": conv(6, 12), "c": conv(4, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def split_at_positions() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        parts = torch.tensor_split(net.a(x), (2, 9), dim=1)
        return net.fc(pooled(torch.cat([parts[2], net.b(parts[0]), parts[1]], 1)))

    return Net({"a": conv(3, 16), "b": conv(2, 6), "fc": nn.Linear(20, 10)}, forward)


@trick()
def split_after_an_inferred_view() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x)).reshape(-1, 2, 8, 8, 8)
        left, right = x.split(1, 1)
        return net.fc(pooled(net.b(left.reshape(x.shape[0], -1, 8, 8) + right.flatten(1, 2))))

    return Net({"a": conv(3, 16), "b": conv(8, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def slices_from_the_end() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.fc(pooled(net.b(x[:, -6:] + x[:, 1:-9] * x.narrow(1, -8, 6)) + net.c(x[:, -3:-1])))

    return Net({"a": conv(3, 16), "b": conv(6, 12), "c": conv(2, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def every_third_channel_backwards() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.fc(pooled(net.b(x.flip(1)[:, 1::3]) + net.c(x[:, 2:12:4])))

    return Net({"a": conv(3, 16), "b": conv(5, 12), "c": conv(3, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def rolled_over_channels_and_space() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.fc(pooled(net.b(x + x.roll((-4, 2, -1), (1, 2, 3)) * x.roll(20, 1))))

    return Net({"a": conv(3, 16), "b": conv(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def cropped_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return net.fc(pooled(net.b(F.pad(x, (0, 0, 0, 0, -3, 2), value=0.5)) + net.c(F.pad(x, (1, 1, 0, 0, -2, -2)))))

    return Net({"a": conv(3, 16), "b": conv(15, 12), "c": nn.Conv2d(12, 12, (1, 3)), "fc": nn.Linear(12, 10)}, forward)


@trick(share=0.0, frozen="shares memory that is written later")
def written_into_slices() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x)).clone()
        y[:, 4:9] += net.b(x)
        y[:, ::3] = 0.25  # frozen
        y[:, -4:, 2:5] = net.c(x)[:, :, :3]
        return net.fc(pooled(net.d(y)))

    return Net(
        {"a": conv(3, 16), "b": conv(3, 5), "c": conv(3, 4), "d": conv(16, 12), "fc": nn.Linear(12, 10)}, forward
    )


@trick()
def gathered_twice_by_a_constant() -> nn.Module:
    order = torch.tensor([0, 0, 5, 2, 11, 5, 15, 7])
    return Net(
        {"a": conv(3, 16), "b": conv(8, 12), "fc": nn.Linear(12, 10), "order": order},
        lambda net, x: net.fc(pooled(net.b(F.relu(net.a(x))[:, net.order]))),
    )


@trick()
def gathered_by_a_table_of_positions() -> nn.Module:
    order = torch.tensor([[0, 3], [5, 2], [11, 4], [15, 7]])
    return Net(
        {"a": conv(3, 16), "b": conv(4, 12), "fc": nn.Linear(12, 10), "order": order},
        lambda net, x: net.fc(pooled(net.b(F.relu(net.a(x))[:, net.order].sum(2)))),
    )


@trick()
def masked_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x)).masked_fill(net.hidden, 0.5)
        return net.fc(pooled(net.b(torch.where(net.hidden.flip(0), x, x * 2))))

    hidden = (torch.arange(16) % 3 == 0).view(16, 1, 1)
    return Net({"a": conv(3, 16), "b": conv(16, 12), "fc": nn.Linear(12, 10), "hidden": hidden}, forward)


@trick()
def pixels_by_a_mask() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x)).permute(0, 2, 3, 1)
        y = y[x[:, 0] > -9]
        return net.fc(net.b(y).view(-1, 64, 12).mean(1))

    return Net({"a": conv(3, 16), "b": nn.Linear(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def written_by_a_mask() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x)).permute(0, 2, 3, 1).clone()
        y[x[:, 0] > 0] = 0.5
        return net.fc(net.b(y).mean((1, 2)))

    return Net({"a": conv(3, 16), "b": nn.Linear(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick(share=0.5, frozen="indexed by a tensor")
def gathered_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        order = torch.arange(8, device=x.device).flip(0).view(1, 8, 1, 1).expand(x.shape[0], 8, 8, 8)
        return net.fc(pooled(net.b(y.gather(1, order))))  # frozen

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.5, frozen="scatter")
def scattered_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        order = (torch.arange(8, device=x.device) % 5).view(1, 8, 1, 1).expand(x.shape[0], 8, 8, 8)
        return net.fc(pooled(net.b(torch.zeros_like(y).scatter_add(1, order, y))))  # frozen

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.5, frozen="index_add")
def added_at_positions() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.fc(pooled(net.b(torch.zeros_like(y).index_add(1, net.order, y))))  # frozen

    order = torch.arange(8) % 5
    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10), "order": order}, forward)


@trick(share=0.5, frozen="cumsum over the axis")
def accumulated_over_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(pooled(net.b(net.a(x).cumsum(1))))  # frozen

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.5, frozen="topk over the axis")
def largest_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(pooled(net.b(net.a(x).topk(4, 1).values)))  # frozen

    return Net({"a": conv(3, 8), "b": conv(4, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.5, frozen="sort over the axis")
def sorted_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(pooled(net.b(net.a(x).sort(1).values)))  # frozen

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.4, frozen="gives positions on the axis")
def position_of_the_largest_channel() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        best = y.argmax(1, keepdim=True)  # frozen
        return net.fc(pooled(net.b(x)) * best.float().mean((2, 3)) / 8)

    return Net({"a": conv(3, 8), "b": conv(3, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.4, frozen="gives positions on the axis")
def position_of_the_median_channel() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        values, place = y.median(1, keepdim=True)  # frozen
        return net.fc(pooled(net.b(x)) * (place.float() + values).mean((2, 3)) / 8)

    return Net({"a": conv(3, 8), "b": conv(3, 16), "fc": nn.Linear(16, 10)}, forward)
