"""Matrix products, einsum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, network, trick


@network((9, 12))
def einsum() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(torch.einsum("bnc,dc->bnd", F.relu(net.a(x)), net.w).mean(1))

    return Net({"a": nn.Linear(12, 16), "w": nn.Parameter(torch.randn(14, 16)), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12))
def einsum_with_an_ellipsis() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.einsum("...c,dc->...d", F.relu(net.a(x)), net.w)
        return net.fc(torch.einsum("b...d,...->bd", y, net.weights))

    return Net(
        {
            "a": nn.Linear(12, 16),
            "w": nn.Parameter(torch.randn(14, 16)),
            "weights": torch.rand(9),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((9, 12))
def einsum_without_an_arrow() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.einsum("anc,cd", F.relu(net.a(x)), net.w)  # letters that occur once, sorted: adn
        return net.fc(y.mean(2))

    return Net({"a": nn.Linear(12, 16), "w": nn.Parameter(torch.randn(16, 14)), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12))
def heads_in_the_weight() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (net.q, net.k, net.v))
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return net.fc(torch.einsum("bhnm,bhmd,hdc->bnc", weights, v, net.o).mean(1))

    parts = {name: nn.Parameter(torch.randn(3, 12, 8)) for name in "qk"}
    return Net(
        {
            **parts,
            "v": nn.Parameter(torch.randn(3, 12, 6)),
            "o": nn.Parameter(torch.randn(3, 6, 16)),
            "fc": nn.Linear(16, 10),
        },
        forward,
    )


@trick((9, 12), counted=False)
def products_with_vectors() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        weights = torch.softmax(y @ net.query, -1)
        y = net.b(y)
        y = (weights[:, None] @ y)[:, 0] + torch.matmul(net.mean, y)
        return net.fc(y) + torch.dot(net.query, net.query)

    return Net(
        {
            "a": nn.Linear(12, 16),
            "query": nn.Parameter(torch.randn(16)),
            "mean": nn.Parameter(torch.rand(9)),
            "b": nn.Linear(16, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((9, 12))
def weights_on_the_left() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.w @ x.transpose(1, 2))
        y = torch.addmm(net.bias, y.mean(2), net.v)
        return net.fc(torch.tensordot(F.relu(y), net.u, dims=([1], [0])))

    return Net(
        {
            "w": nn.Parameter(torch.randn(16, 12)),
            "v": nn.Parameter(torch.randn(16, 14)),
            "bias": nn.Parameter(torch.randn(14)),
            "u": nn.Parameter(torch.randn(14, 18)),
            "fc": nn.Linear(18, 10),
        },
        forward,
    )


@trick((12,), counted=False)
def bilinear() -> nn.Module:
    return Net(
        {"a": nn.Linear(12, 8), "b": nn.Linear(12, 6), "c": nn.Bilinear(8, 6, 14), "fc": nn.Linear(14, 10)},
        lambda net, x: net.fc(net.c(F.relu(net.a(x)), torch.tanh(net.b(x)))),
    )


@trick((12,))
def outer_product_of_two_nets() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = F.relu(net.a(x)), torch.tanh(net.b(x))
        return net.fc(net.c((a[:, :, None] * b[:, None]).flatten(1)))

    return Net({"a": nn.Linear(12, 8), "b": nn.Linear(12, 6), "c": nn.Linear(48, 14), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12))
def likeness_of_features() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x), net.b(x)
        return net.fc(net.c(x).mean(1)) * F.cosine_similarity(a, b, dim=-1).mean(1, keepdim=True)

    return Net(
        {"a": nn.Linear(12, 16), "b": nn.Linear(12, 16), "c": nn.Linear(12, 14), "fc": nn.Linear(14, 10)}, forward
    )


@trick((9, 12))
def distance_to_prototypes() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(torch.exp(-torch.cdist(F.relu(net.a(x)), net.prototypes) / 9).mean(1))

    return Net(
        {"a": nn.Linear(12, 16), "prototypes": nn.Parameter(torch.randn(14, 16)), "fc": nn.Linear(14, 10)}, forward
    )
