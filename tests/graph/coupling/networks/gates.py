"""Gates, reductions over channels, and what chooses between branches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled, trick


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
def glu_gate() -> nn.Module:
    return nn.Sequential(conv(3, 24), nn.GLU(1), conv(12, 8), nn.Flatten(), nn.Linear(8 * 64, 10))


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
def spatial_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return net.fc(pooled(net.b(x * torch.sigmoid(net.gate(gate)))))

    return Net({"a": conv(3, 12), "gate": conv(2, 1), "b": conv(12, 6), "fc": nn.Linear(6, 10)}, forward)


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


@trick((9, 12))
def swish_gate_in_two_chunks() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        gate, value = net.up(x).chunk(2, -1)
        return net.fc(net.down(F.silu(gate) * value).mean(1))

    return Net({"up": nn.Linear(12, 40), "down": nn.Linear(20, 14), "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12))
def gate_from_the_other_half() -> nn.Module:
    """Half of the features gate the other half, in turn."""

    def forward(net: Net, x: Tensor) -> Tensor:
        value, gate = net.up(x).unflatten(-1, (20, 2)).unbind(-1)
        return net.fc(net.down(F.gelu(gate) * value).mean(1))

    return Net({"up": nn.Linear(12, 40), "down": nn.Linear(20, 14), "fc": nn.Linear(14, 10)}, forward)


@trick(share=0.4, frozen="slides over the axis")
def gate_by_neighbouring_channels() -> nn.Module:
    """Wang et al. 2020, "ECA-Net"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = net.gate(pooled(x)[:, None])  # frozen
        return net.fc(pooled(net.b(x * torch.sigmoid(gate).view(-1, 8, 1, 1))))

    return Net(
        {"a": conv(3, 8), "gate": nn.Conv1d(1, 1, 3, padding=1), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward
    )


@trick(share=0.4, frozen="pooled")
def response_norm() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.norm(F.relu(net.a(x)))  # frozen
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "norm": nn.LocalResponseNorm(3), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.9)
def softmax_over_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).softmax(1)
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick(share=0.4, frozen="pooled")
def pooled_over_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.avg_pool1d(net.a(x).flatten(2).transpose(1, 2), 2).transpose(1, 2)  # frozen
        return net.fc(net.b(x.unflatten(2, (8, 8))).mean((2, 3)))

    return Net({"a": conv(3, 8), "b": conv(4, 16), "fc": nn.Linear(16, 10)}, forward)


@trick()
def normalised_by_all_channels() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        x = x / (0.1 + x.abs().amax((1, 2, 3), keepdim=True) + torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True))
        return net.fc(pooled(net.b(x * net.scale)) * x.logsumexp((1, 2, 3)).view(-1, 1))

    return Net(
        {"a": conv(3, 16), "scale": nn.Parameter(torch.rand(16, 1, 1)), "b": conv(16, 12), "fc": nn.Linear(12, 10)},
        forward,
    )


@trick()
def global_response_norm() -> nn.Module:
    """Woo et al. 2023, "ConvNeXt V2"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.gelu(net.a(x)).permute(0, 2, 3, 1)
        length = x.norm(p=2, dim=(1, 2), keepdim=True)
        x = net.scale * (x * (length / (length.mean(-1, keepdim=True) + 1e-6))) + x
        return net.fc(net.b(x).mean((1, 2)))

    return Net(
        {"a": conv(3, 16), "scale": nn.Parameter(torch.rand(16)), "b": nn.Linear(16, 12), "fc": nn.Linear(12, 10)},
        forward,
    )


@trick((9, 12), share=0.4)
def mixture_of_experts() -> nn.Module:
    """The two best of four experts, all computed, weighted by a scattered softmax."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        best, chosen = net.gate(x).topk(2, -1)
        weights = torch.zeros(*x.shape[:2], 4).scatter(-1, chosen, best.softmax(-1))
        y = torch.stack([F.relu(getattr(net, f"e{number}")(x)) for number in range(4)], -2)
        return net.fc((weights[..., None] * y).sum(-2).mean(1))

    experts = {f"e{number}": nn.Linear(16, 14) for number in range(4)}
    return Net({"a": nn.Linear(12, 16), "gate": nn.Linear(16, 4), **experts, "fc": nn.Linear(14, 10)}, forward)


@trick((9, 12), share=0.4, counted=False)
def experts_in_one_weight() -> nn.Module:
    """Where one expert is left, torch weights it by a product entry by entry, which its counter leaves out."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        weights = net.gate(x).softmax(-1)
        hidden = F.gelu(torch.einsum("bnc,ech->bneh", x, net.up))
        return net.fc(torch.einsum("bneh,ehd,bne->bnd", hidden, net.down, weights).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 16),
            "gate": nn.Linear(16, 3),
            "up": nn.Parameter(torch.randn(3, 16, 20)),
            "down": nn.Parameter(torch.randn(3, 20, 14)),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick(linear=False)
def smallest_channel_by_a_norm() -> nn.Module:
    """A norm of order minus infinity over channels, for which an entry of zero is not one that is gone."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.fc(pooled(net.b(x / (1 + torch.linalg.vector_norm(x, ord=-math.inf, dim=1, keepdim=True)))))

    return Net({"a": conv(3, 16), "b": conv(16, 16), "fc": nn.Linear(16, 10)}, forward)
