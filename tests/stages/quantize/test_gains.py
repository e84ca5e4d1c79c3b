"""Which layers gain on integers: the choice against brute force, and graphs against latencies that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.device.host import resolve
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.measure.operators import Operator, OperatorTable
from mil_cli.stages.quantize.gains import Kernel, choose_kernels, gaining_layers
from mil_cli.stages.quantize.placement import place_any


def cost(
    kernels: Sequence[Kernel], conversions: Mapping[str, float], float_readers: Collection[str], chosen: set[str]
) -> float:
    """Return the seconds that a choice takes beside all in float, infinite if one that follows does not."""
    made = {kernel.gives for kernel in kernels if kernel.name in chosen and kernel.gives is not None}
    total = -sum(kernel.gain for kernel in kernels if kernel.name in chosen)
    for value, seconds in conversions.items():
        reading = [kernel for kernel in kernels if value in kernel.reads]
        if value in made:
            total += seconds * (value in float_readers or any(kernel.name not in chosen for kernel in reading))
        else:
            total += seconds * any(kernel.name in chosen for kernel in reading)
    for kernel in kernels:
        if kernel.follows and (kernel.name in chosen) != any(value in made for value in kernel.reads):
            return float("inf")
    return total


def random_kernels(generator: np.random.Generator, count: int) -> list[Kernel]:
    kernels = []
    for number in range(count):
        before = [f"v{index}" for index in range(number)]
        reads = tuple(generator.choice(before, size=min(len(before), 2), replace=False)) if before else ("x",)
        follows = len(reads) == 2 and generator.random() < 0.5
        reads = reads if follows else reads[:1]
        gives = f"v{number}" if follows or generator.random() < 0.8 else None
        gain = 0.0 if follows else float(generator.normal())
        name = f"k{number - 1}" if number % 4 == 3 and not follows and not kernels[-1].follows else f"k{number}"
        kernels.append(Kernel(name, gain, reads, gives, follows))
    return kernels


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_faster(seed: int) -> None:
    generator = np.random.default_rng(seed)
    kernels = random_kernels(generator, 9)
    values = dict.fromkeys(["x", *(value for kernel in kernels for value in (*kernel.reads, kernel.gives) if value)])
    conversions = {value: float(generator.uniform(0, 1)) for value in values}
    float_readers = {value for value in values if generator.random() < 0.3}
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    every = [set(itertools.compress(names, bits)) for bits in itertools.product((0, 1), repeat=len(names))]
    best = min(cost(kernels, conversions, float_readers, chosen) for chosen in every)
    found = choose_kernels(kernels, conversions, float_readers)
    assert cost(kernels, conversions, float_readers, found) == pytest.approx(best, abs=1e-9)


def test_a_layer_that_loses_a_little_saves_conversions_between_its_neighbours() -> None:
    kernels = [
        Kernel("first", 1.0, ("x",), "a"),
        Kernel("middle", -0.3, ("a",), "b"),
        Kernel("last", 1.0, ("b",), "c"),
    ]
    dear, cheap = dict.fromkeys("xabc", 0.4), dict.fromkeys("xabc", 0.1)
    assert choose_kernels(kernels, dear, {"c"}) == {"first", "middle", "last"}
    assert choose_kernels(kernels, cheap, {"c"}) == {"first", "last"}
    assert choose_kernels(kernels, dict.fromkeys("xabc", 2.0), {"c"}) == set()


class Separable(nn.Module):
    """A wide layer, a depthwise one behind an activation that integers do not have, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        x = torch.relu(self.wide(torch.relu(self.deep(x))) + x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class MadeUp(OperatorTable):
    """A table whose latencies are made up."""

    def __init__(self, seconds: Callable[[Operator], float]) -> None:
        super().__init__(resolve({"name": "host_cpu"}))
        self._made_up = seconds

    def measure(self, operators: Iterable[Operator]) -> None:
        self._seconds.update((operator.key, self._made_up(operator)) for operator in operators)


def depthwise(operator: Operator) -> bool:
    return operator.kind == "conv" and operator["groups"] != 1


def gaining(seconds: Callable[[Operator], float]) -> set[str]:
    torch.manual_seed(0)
    folded = fold_batch_norm(Model.capture(Separable().eval(), (torch.randn(2, 1, 8, 8),)))
    return gaining_layers(folded, place_any(folded.graph, policy="auto"), MadeUp(seconds))


def test_what_loses_stays_float() -> None:
    def free(operator: Operator) -> float:
        return 0.0 if operator.kind == "conversion" else 3.0 if depthwise(operator) and operator.int8 else 1.5

    assert gaining(lambda operator: 0.5 if operator.int8 else free(operator)) == {"stem.0", "deep", "wide", "head"}
    assert gaining(lambda operator: 0.5 if operator.int8 and not depthwise(operator) else free(operator)) == {
        "stem.0",
        "wide",
        "head",
    }


def test_conversions_that_cost_more_than_all_gain_leave_all_float() -> None:
    def slow(operator: Operator) -> float:
        if operator.kind == "conversion":
            return 1.0
        own = 0.5 if operator.kind == "linear" and operator.int8 else 0.0  # it quantizes what it reads
        return own + (1e-3 if operator.int8 else 2e-3)

    assert gaining(slow) == set()
