"""Bounds on time and memory of the analysis and of a cut, on networks of real size."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import nn

from mil_cli.graph.coupling import analyse, cut, repair
from mil_cli.graph.model import Model
from tests.graph.coupling import large

pytestmark = pytest.mark.slow

LOADED = 2.0  # how much longer than on an idle machine


class PeakMemory:
    """Watches how far the process grows, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def grown(self) -> int:
        return self._peak - self._before


@pytest.mark.parametrize(
    ("build", "image", "nodes", "seconds"),
    [
        (large.resnet50, 224, 300, 3.0),
        (large.vit_b16, 224, 300, 5.0),
        (lambda: large.mixed(width=192), 16, 2500, 10.0),
    ],
    ids=["resnet50", "vit_b16", "mixed"],
)
def test_analysis_and_cut_are_quick_and_small(
    build: Callable[[], nn.Module], image: int, nodes: int, seconds: float
) -> None:
    model = Model.capture(build().eval(), (torch.randn(2, 3, image, image),))
    assert len(model.graph.graph.nodes) >= nodes
    analyse(model)  # whatever torch loads at the first use of an operator is not ours
    start = time.process_time()
    coupling = analyse(model)
    assert time.process_time() - start < LOADED * seconds
    with PeakMemory() as memory:
        analyse(model)
    assert memory.grown < sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert coupling.cuttable_share > 0.9
    removed = repair(coupling, {n: space.free[: len(space.free) * 2 // 5] for n, space in enumerate(coupling.spaces)})
    start = time.process_time()
    small = cut(model, coupling, removed)
    assert time.process_time() - start < LOADED * 2.0
    assert small.num_params() < 0.6 * model.num_params()


def test_analysis_of_many_small_layers_takes_no_more_memory_than_the_model() -> None:
    """Of a model whose graph outweighs its weights, all of what a copy of it takes counts."""
    model = Model.capture(large.mixed().eval(), (torch.randn(2, 3, 16, 16),))
    assert len(model.graph.graph.nodes) > 2500
    weights = sum(each.numel() * each.element_size() for each in (*model.graph.parameters(), *model.graph.buffers()))
    analyse(model)
    nodes, _ = traced(model.clone)
    kept, peak = traced(lambda: analyse(model))
    assert kept <= peak < nodes + weights


def traced(make: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes of Python objects that are left of what a call makes, and the most that there were meanwhile."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        left = tracemalloc.get_traced_memory()[0]
        del made
    finally:
        tracemalloc.stop()
    return left, peak
