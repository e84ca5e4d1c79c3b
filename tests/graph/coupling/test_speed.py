"""Bounds on time and memory of the analysis and of a cut, on networks of real size."""

from __future__ import annotations

import gc
import threading
import time
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
