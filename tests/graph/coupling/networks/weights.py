"""Weights that are computed, normalised or shared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled, trick


@network(linear=False)
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


@network((9,))
def tied_embedding() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.embed((x.abs() * 7).long() % 20)
        return F.linear(y + net.down(F.relu(net.up(y))), net.embed.weight)

    return Net({"embed": nn.Embedding(20, 16), "up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}, forward)


@trick(linear=False, counted=False)
def spectral_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(conv(3, 12)),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(conv(12, 8)),
        nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )


@trick((12,))
def decoder_with_the_encoders_weight() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.first(x))
        z = F.relu(net.second(y))
        y = F.relu(F.linear(z, net.second.weight.t(), net.bias))
        return F.linear(y, net.first.weight.mT)

    return Net(
        {"first": nn.Linear(12, 20), "second": nn.Linear(20, 14), "bias": nn.Parameter(torch.randn(20))}, forward
    )


@trick((9, 12))
def low_rank_addition() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        weight = net.w + net.up @ net.down * 0.5
        return net.fc(net.b(F.relu(F.linear(x, weight))).mean(1))

    return Net(
        {
            "w": nn.Parameter(torch.randn(16, 12)),
            "up": nn.Parameter(torch.randn(16, 4)),
            "down": nn.Parameter(torch.randn(4, 12)),
            "b": nn.Linear(16, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick(linear=False)
def ternary_weights() -> nn.Module:
    def ternary(weight: Tensor) -> Tensor:
        length = weight.abs().mean((1, 2, 3), keepdim=True)
        return torch.where(weight.abs() > 0.7 * length, weight.sign() * length, torch.zeros_like(weight))

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, ternary(net.a), padding=1))
        return net.fc(pooled(F.conv2d(x, ternary(net.b), padding=1)))

    return Net(
        {
            "a": nn.Parameter(torch.randn(16, 3, 3, 3)),
            "b": nn.Parameter(torch.randn(12, 16, 3, 3)),
            "fc": nn.Linear(12, 10),
        },
        forward,
    )


@trick((9, 12), share=0.3)
def weights_made_by_a_net() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        made = net.maker(F.relu(net.seed(y.mean(1)))).view(-1, 16, 14)
        return net.fc(torch.bmm(y, made).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 16),
            "seed": nn.Linear(16, 6),
            "maker": nn.Linear(6, 16 * 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((9, 12))
def weights_from_a_code_of_its_own() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        made = net.maker(torch.tanh(net.seed)).view(14, 16)
        return net.fc(F.linear(F.relu(net.a(x)), made).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 16),
            "seed": nn.Parameter(torch.randn(6)),
            "maker": nn.Linear(6, 16 * 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick()
def one_weight_two_widths() -> nn.Module:
    """A slimmable layer: its first rows and columns make the narrow one."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        wide = F.conv2d(x, net.w, padding=1)
        narrow = F.conv2d(x[:, :6], net.w[:5, :6], padding=1)
        return net.fc(pooled(net.b(wide)) + pooled(net.c(narrow)))

    return Net(
        {
            "a": conv(3, 12),
            "w": nn.Parameter(torch.randn(14, 12, 3, 3)),
            "b": conv(14, 16),
            "c": conv(5, 16),
            "fc": nn.Linear(16, 10),
        },
        forward,
    )


@trick()
def normalised_per_filter() -> nn.Module:
    """Qiao et al. 2019, "Weight Standardization", written out."""

    def forward(net: Net, x: Tensor) -> Tensor:
        w = net.w - net.w.mean((1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return net.fc(pooled(net.b(F.relu(F.conv2d(F.relu(net.a(x)), w, padding=1)))))

    return Net(
        {
            "a": conv(3, 12),
            "w": nn.Parameter(torch.randn(14, 12, 3, 3)),
            "b": conv(14, 16),
            "fc": nn.Linear(16, 10),
        },
        forward,
    )


@trick()
def masked_weights() -> nn.Module:
    """Weights times constants of zeros and ones, as `torch.nn.utils.prune` leaves them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, net.first * net.first_mask.float(), padding=1))
        return net.fc(pooled(F.relu(F.conv2d(x, net.second * net.second_mask.float(), padding=1))))

    parts: dict[str, nn.Module | nn.Parameter | Tensor] = {"fc": nn.Linear(12, 10)}
    for name, shape in (("first", (16, 3, 3, 3)), ("second", (12, 16, 3, 3))):
        parts |= {name: nn.Parameter(torch.randn(shape)), f"{name}_mask": torch.rand(shape) > 0.3}
    return Net(parts, forward)


@trick(linear=False)
def one_length_of_a_whole_weight() -> nn.Module:
    """Weight norm over all axes, whose length has no axes."""
    normed = nn.utils.parametrizations.weight_norm(conv(3, 16), dim=None)
    return Net({"a": normed, "fc": nn.Linear(16, 10)}, lambda net, x: net.fc(pooled(F.relu(net.a(x)))))
