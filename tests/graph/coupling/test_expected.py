"""The expected count against the exact one: at certainty, and in the mean over random cuts."""

from __future__ import annotations

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


def analysed(name: str) -> tuple[Coupling, Counter]:
    torch.manual_seed(0)
    coupling = analyse(Model.capture(NETS[name]().eval(), (torch.randn(2, 1, 8, 8),)))
    return coupling, Counter(coupling)


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
    # attention's queries and values are cut apart: a power stands for the sum
    assert float(expected(kept)) == pytest.approx(exact(counter, counted, cut), abs=0.01 if name == "vit" else 1e-6)


def test_its_gradient_is_right() -> None:
    coupling, counter = analysed("vit")
    kept = probabilities(coupling, 0.3).requires_grad_(True)
    assert torch.autograd.gradcheck(ExpectedCount(counter, "macs"), kept)
