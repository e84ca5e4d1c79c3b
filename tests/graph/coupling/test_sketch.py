"""Graphs drawn on shapes alone, against those of captures: what either says of memory is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.graph.coupling import Counter, MemoryEstimate, Sketcher, analyse
from mil_cli.graph.coupling.coupling import Coupling
from mil_cli.graph.model import Model


class Sliced(nn.Module):
    """Attention from a fused projection, tied weights, a table that is looked up, parts, writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.out.weight
        self.bias = nn.Parameter(torch.randn(9))
        self.register_buffer("places", torch.arange(6)[:, None].sub(torch.arange(6)) + 5)
        self.places.clamp_(0, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[self.places])
        y = self.out(y.transpose(1, 2).flatten(2))
        first, second = self.again(y).relu_().chunk(2, -1)
        later = x[:, 1:] + torch.arange(5)[:, None]
        later[:, :2] += 1
        return first * second, {"later": later}


class Convolutions(nn.Sequential):
    """Every kind of norm, dropout, and a shuffle of channels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, padding="same", bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(8, 12, 3, stride=2, groups=2),
            nn.ChannelShuffle(2),
            nn.GroupNorm(3, 12),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        )


NETS = {
    "sliced": lambda: (Sliced(), torch.randn(3, 6, 8)),
    "convolutions": lambda: (Convolutions(), torch.randn(3, 4, 9, 9)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)),
}


def sketched(sketcher: Sketcher, net: nn.Module, x: Tensor) -> Coupling:
    shapes = {id(one): one.to("meta") for one in net.buffers() if one.is_floating_point()}
    shapes |= {id(one): nn.Parameter(one.to("meta")) for one in net.parameters()}
    return sketcher.sketch(copy.deepcopy(net, shapes), (x[:1].to("meta"),))


@pytest.mark.parametrize("name", NETS)
def test_memory_is_that_of_the_capture(name: str) -> None:
    net, x = NETS[name]()
    net.eval()
    captured = MemoryEstimate(Counter(analyse(Model.capture(net, (x,)))))
    sketcher = Sketcher()
    for _ in range(2):  # the second time from what is remembered
        drawn = MemoryEstimate(Counter(sketched(sketcher, net, x)))
        assert drawn.weights({}) == captured.weights({}) > 0
        assert drawn.constants({}) == captured.constants({})
        assert drawn.activations({}) == captured.activations({}) > 0


def test_what_depends_on_values_is_refused() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises((RuntimeError, NotImplementedError)):
        sketched(Sketcher(), Depends(), torch.ones(1, 3))
