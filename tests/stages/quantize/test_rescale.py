"""Factors of channels move from makers to readers: outputs stay, whatever lies between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import op_name
from mil_cli.stages.quantize.rescale import find_links, made_range, move, read_range


class Function(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.layers)


class RmsNorm(nn.Module):
    """As transformers writes it: the gain is multiplied from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def gated(x: Tensor, up: nn.Module, gate: nn.Module, down: nn.Module) -> Tensor:
    return down(functional.silu(gate(x)) * up(x))


def residual(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = torch.relu(a(x))
    return y + b(y)


IMAGE, TOKENS = (2, 6, 5, 5), (2, 5, 6)


def conv() -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, padding=1)


def linear() -> nn.Linear:
    return nn.Linear(6, 6)


LINKED = {
    "plain": (IMAGE, Function(lambda x, a, b: b(a(x)), a=conv(), b=conv()), 1),
    "without padding": (IMAGE, Function(lambda x, a, b: b(a(x)), a=nn.Conv2d(6, 4, 1), b=nn.Conv2d(4, 6, 1)), 1),
    "folded norm": (
        IMAGE,
        Function(
            lambda x, a, n, b: b(n(a(x))), a=nn.Conv2d(6, 6, 1, bias=False), n=nn.BatchNorm2d(6), b=nn.Conv2d(6, 6, 1)
        ),
        1,
    ),
    "depthwise": (
        IMAGE,
        Function(lambda x, a, b, c: c(b(a(x).relu()).relu()), a=conv(), b=nn.Conv2d(6, 6, 3, groups=6), c=conv()),
        2,
    ),
    "grouped": (
        IMAGE,
        Function(lambda x, a, b: b(a(x)), a=nn.Conv2d(6, 4, 1, groups=2), b=nn.Conv2d(4, 6, 3, groups=2)),
        1,
    ),
    "transposed": (
        IMAGE,
        Function(
            lambda x, a, b, c: c(b(a(x)).relu()),
            a=conv(),
            b=nn.ConvTranspose2d(6, 4, 3, groups=2),
            c=nn.ConvTranspose2d(4, 6, 2, groups=2),
        ),
        2,
    ),
    "pooled": (
        IMAGE,
        Function(
            lambda x, a, b: b(functional.adaptive_avg_pool2d(functional.max_pool2d(a(x), 2), 1).flatten(1)),
            a=conv(),
            b=linear(),
        ),
        1,
    ),
    "averaged": (IMAGE, Function(lambda x, a, b: b(functional.leaky_relu(a(x)).mean((2, 3))), a=conv(), b=linear()), 1),
    "permuted": (IMAGE, Function(lambda x, a, b: b(a(x).permute(0, 2, 3, 1)), a=conv(), b=linear()), 1),
    "transposed tokens": (
        IMAGE,
        Function(lambda x, a, b: b(a(x).mean(3).transpose(1, 2)), a=conv(), b=linear()),
        1,
    ),
    "norm": (TOKENS, Function(lambda x, n, q, k: q(n(x)) * k(n(x)), n=nn.LayerNorm(6), q=linear(), k=linear()), 0),
    "norm read twice": (
        TOKENS,
        Function(lambda x, n, q, k: (lambda y: q(y) * k(y))(n(x)), n=nn.LayerNorm(6), q=linear(), k=linear()),
        1,
    ),
    "norm without bias": (TOKENS, Function(lambda x, n, q: q(n(x)), n=nn.LayerNorm(6, bias=False), q=linear()), 1),
    "rms norm": (TOKENS, Function(lambda x, n, q: q(n(x)), n=nn.RMSNorm(6), q=linear()), 1),
    "rms norm by hand": (TOKENS, Function(lambda x, n, q: q(n(x)), n=RmsNorm(), q=linear()), 1),
    "gated": (TOKENS, Function(gated, up=linear(), gate=linear(), down=linear()), 1),
    "relu6": (IMAGE, Function(lambda x, a, b: b(functional.relu6(a(x))), a=conv(), b=conv()), 0),
    "gelu": (TOKENS, Function(lambda x, a, b: b(functional.gelu(a(x))), a=linear(), b=linear()), 0),
    "residual": (IMAGE, Function(residual, a=conv(), b=conv()), 0),
    "squared": (TOKENS, Function(lambda x, a, b: b((lambda y: y * y)(a(x))), a=linear(), b=linear()), 0),
    "other axis": (IMAGE, Function(lambda x, a, b: b(a(x)), a=conv(), b=nn.Linear(5, 3)), 0),
    "flat": (IMAGE, Function(lambda x, a, b: b(a(x).flatten(1)), a=conv(), b=nn.Linear(150, 3)), 0),
    "averaged channels": (IMAGE, Function(lambda x, a, b: b(a(x).mean(1)), a=conv(), b=nn.Linear(5, 3)), 0),
    "norm without gain": (
        TOKENS,
        Function(lambda x, n, q: q(n(x)), n=nn.LayerNorm(6, elementwise_affine=False), q=linear()),
        0,
    ),
    "tied": (TOKENS, Function(lambda x, a: a(a(x)), a=linear()), 0),
}


@pytest.mark.parametrize("name", LINKED)
def test_outputs_stay(name: str) -> None:
    shape, module, links = LINKED[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = fold_batch_norm(Model.capture(module.eval(), (x,)))
    expected = model(x)
    found = list(find_links(model.graph))
    assert len(found) == links
    for link in found:
        before = model(x)
        channels = link.value.meta["val"].shape[link.axis]
        factor = torch.rand(channels, dtype=torch.float64) * 3 + 0.1
        read = [read_range(model.graph, reader) for reader in link.readers]
        move(model.graph, link, factor)
        for reader, was in zip(link.readers, read, strict=True):
            torch.testing.assert_close(read_range(model.graph, reader), was * factor, rtol=1e-5, atol=0)
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "grouped", "transposed"])
def test_made_range_is_what_a_factor_divides(name: str) -> None:
    shape, module, _ = LINKED[name]
    model = Model.capture(module.eval(), (torch.randn(shape),))
    for link in find_links(model.graph):
        assert op_name(link.maker) in ("conv2d", "conv_transpose2d")
        before = made_range(model.graph, link.maker)
        factor = torch.arange(1, len(before) + 1, dtype=torch.float64)
        move(model.graph, link, factor)
        torch.testing.assert_close(made_range(model.graph, link.maker), before / factor, rtol=1e-5, atol=0)
