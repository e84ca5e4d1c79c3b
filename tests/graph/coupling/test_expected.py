"""The expected count against the exact one: at certainty, and in the mean over random cuts."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import Counter, Coupling, analyse
from mil_cli.graph.coupling.expected import ExpectedCount
from mil_cli.graph.model import Model
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit

Counted = Literal["macs", "params", "channels"]
NETS: dict[str, Any] = {
    "resnet": lambda: resnet20(width=8, blocks=1),
    "vit": lambda: vit(image_size=8, patch=2, dim=32, depth=1, heads=4),
    "plain": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ),
}


class Attention(nn.Module):
    """Two heads whose queries and values have other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Recurrent(nn.Module):
    """The hidden units are read by themselves and by the layer's input: a square and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.cells(x)[0])
        return found


class Stream(nn.Module):
    """A layer from a residual stream into itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = self.out(x + torch.relu(self.inner(x)))
        return found


class Merged(nn.Module):
    """One space lies on two axes of a weight, on one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(3, 5), nn.Linear(10, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = self.out(x + torch.relu(self.inner(torch.cat([x, x], 2))))
        return found


def coupled(module: nn.Module, inputs: Tensor) -> tuple[Coupling, Counter]:
    coupling = analyse(Model.capture(module.eval(), (inputs,)))
    return coupling, Counter(coupling)


def analysed(name: str) -> tuple[Coupling, Counter]:
    torch.manual_seed(0)
    return coupled(NETS[name](), torch.randn(2, 1, 8, 8))


def exact(counter: Counter, counted: Counted, removed: dict[int, set[int]]) -> float:
    count = {"macs": counter.macs, "params": counter.params, "channels": counter.channels}[counted]
    return count(removed) / count({})


def drawn(coupling: Coupling, kept: Tensor, offsets: list[int], generator: np.random.Generator) -> dict[int, set[int]]:
    found = {}
    for number, space in enumerate(coupling.spaces):
        chance = kept[offsets[number] : offsets[number + 1]].detach().numpy()
        found[number] = {int(c) for c in np.flatnonzero(generator.random(space.size) >= chance)}
    return found


def probabilities(coupling: Coupling, low: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for space in coupling.spaces:
        part = low + (1 - low) * torch.rand(space.size, generator=generator, dtype=torch.float64)
        part[list(space.frozen)] = 1.0
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("counted", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_it_is_the_mean_over_random_cuts(name: str, counted: Counted) -> None:
    coupling, counter = analysed(name)
    expected = ExpectedCount(counter, counted)
    kept = probabilities(coupling, 0.3)
    generator = np.random.default_rng(0)
    cuts = [drawn(coupling, kept, expected.offsets, generator) for _ in range(400)]
    counts = [exact(counter, counted, cut) for cut in cuts]
    noise = float(np.std(counts)) / len(counts) ** 0.5
    assert float(expected(kept)) == pytest.approx(float(np.mean(counts)), abs=4 * noise + 0.01)


@pytest.mark.parametrize("counted", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_where_all_is_certain_it_is_the_count(name: str, counted: Counted) -> None:
    coupling, counter = analysed(name)
    expected = ExpectedCount(counter, counted)
    generator = np.random.default_rng(1)
    cut = drawn(coupling, probabilities(coupling, 0.3), expected.offsets, generator)
    kept = torch.ones(expected.offsets[-1], dtype=torch.float64)
    assert float(expected(kept)) == pytest.approx(1.0)
    for number, classes in cut.items():
        kept[[expected.offsets[number] + each for each in classes]] = 0.0
    assert float(expected(kept)) == pytest.approx(exact(counter, counted, cut), abs=1e-6)


@pytest.mark.parametrize("counted", ["macs", "params"])
@pytest.mark.parametrize("low", [0.1, 0.5])
@pytest.mark.parametrize("net", [Attention, Recurrent, Stream, Merged])
def test_it_is_the_sum_over_every_cut(net: type[nn.Module], low: float, counted: Counted) -> None:
    """Heads, their sizes, and axes that one space labels twice: each cut by its count and its probability."""
    coupling, counter = coupled(net(), torch.randn(2, 5, 3))
    expected = ExpectedCount(counter, counted)
    kept = probabilities(coupling, low)
    places = (kept < 1).nonzero().flatten().tolist()
    owners = {
        place: (number, place - expected.offsets[number])
        for number, space in enumerate(coupling.spaces)
        for place in range(expected.offsets[number], expected.offsets[number] + space.size)
    }
    total = 0.0
    for stays in itertools.product((True, False), repeat=len(places)):
        removed: dict[int, set[int]] = {}
        chance = 1.0
        for place, stay in zip(places, stays, strict=True):
            chance *= float(kept[place]) if stay else 1 - float(kept[place])
            if not stay:
                removed.setdefault(owners[place][0], set()).add(owners[place][1])
        total += chance * exact(counter, counted, removed)
    assert 4 <= len(places) <= 10
    assert float(expected(kept)) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("net", ["vit", "stream"])
def test_its_gradient_is_right(net: str) -> None:
    coupling, counter = coupled(Stream(), torch.randn(2, 5, 3)) if net == "stream" else analysed(net)
    kept = probabilities(coupling, 0.3).requires_grad_(True)
    assert torch.autograd.gradcheck(ExpectedCount(counter, "macs"), kept)
