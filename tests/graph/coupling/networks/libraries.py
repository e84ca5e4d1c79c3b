"""Small networks with what public models were found to use beside the usual, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, network, pooled


@network((9, 12))
def packed_sequence_mask() -> nn.Module:
    """A causal mask within sequences that are packed into one row, told apart where position numbers do not rise."""

    def forward(net: Net, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        sequence = starts.cumsum(-1)
        mask = (positions[:, :, None] >= positions[:, None]) & (sequence[:, :, None] == sequence[:, None])
        b, n, _ = x.shape
        q, k, v = (getattr(net, name)(x).view(b, n, 2, 8).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None].expand(b, -1, n, n))
        return net.fc(net.o(y.transpose(1, 2).reshape(b, n, -1)).mean(1))

    parts = {name: nn.Linear(12, 16) for name in "qkv"}
    return Net({**parts, "o": nn.Linear(16, 24), "fc": nn.Linear(24, 10)}, forward)


@network((8, 12))
def fourier_mixing() -> nn.Module:
    """Positions are mixed by transforms, channels pass; the composite spellings of arithmetic beside them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.embed(x)
        y = torch.subtract(y, torch.fft.fft(y, dim=1).real)
        y = torch.multiply(y, torch.fft.irfftn(torch.fft.rfft2(y[:, None], dim=(1, 2)), dim=(1, 2))[:, 0])
        return net.fc(net.out(F.gelu(y)).mean(1))

    return Net({"embed": nn.Linear(12, 16), "out": nn.Linear(16, 20), "fc": nn.Linear(20, 10)}, forward)


@network()
def outer_grid() -> nn.Module:
    """A grid of two weight vectors, each of which scales what comes out of a layer; and one of positions."""

    def forward(net: Net, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(net.rows, net.columns, indexing="ij")
        across, down = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(-1, 1, 8), indexing="xy")
        y = F.relu(net.a(x + across * down))
        y = torch.einsum("bchw,cd->bdhw", y, rows * columns + rows)
        return net.fc(pooled(net.b(y)))

    return Net(
        {
            "a": conv(3, 12),
            "rows": nn.Parameter(torch.randn(12)),
            "columns": nn.Parameter(torch.randn(16)),
            "b": conv(16, 8),
            "fc": nn.Linear(8, 10),
        },
        forward,
    )


@network((9, 12))
def positions_as_products() -> nn.Module:
    """Numbers of positions become one-hot rows that a table is multiplied by, as a lookup of learned positions."""

    def forward(net: Net, x: Tensor) -> Tensor:
        places = F.one_hot((x.sum(-1).abs() * 3).long() % 6, 6).float()
        y = F.relu(net.a(x)) + places @ net.table
        return net.fc(net.b(y).mean(1))

    return Net(
        {
            "a": nn.Linear(12, 16),
            "table": nn.Parameter(torch.randn(6, 16)),
            "b": nn.Linear(16, 20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@network()
def tiled() -> nn.Module:
    """A window's embedding laid over an image, and one map repeated for every channel."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y = y + net.whole + net.window.tile(1, 2, 2)
        y = F.relu(y) * net.gate(x).repeat(1, 12, 1, 1)
        return net.fc(pooled(net.b(y)))

    return Net(
        {
            "a": conv(3, 12),
            "whole": nn.Parameter(torch.randn(12, 8, 8)),
            "window": nn.Parameter(torch.randn(12, 4, 4)),
            "gate": conv(3, 1),
            "b": conv(12, 8),
            "fc": nn.Linear(8, 10),
        },
        forward,
    )
