"""What all tests share: a private stage cache, one thread, one seed, no Hydra state left, data that may be missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

LONG = ("coupling/test_networks", "tests/recipes/", "tests/cli/", "tests/run/", "tests/export/", "tests/stages/")
"""The files that take longest, in this order."""

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: of several workers none is left with one of them when the others are done."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place for place, part in enumerate(LONG) if part in path), len(LONG))

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin every test, its fixtures too, from one seed: what ran before it in its worker then makes no difference."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test away from the user's stage cache."""
    location = tmp_path / "mil-cache"
    monkeypatch.setenv("MIL_CACHE", str(location))
    return location


@pytest.fixture(autouse=True)
def no_hydra_left() -> Iterator[None]:
    """Fail a test that leaves Hydra initialized: the next one would meet its state."""
    yield
    import sys

    module = sys.modules.get("hydra.core.global_hydra")
    if module is not None:
        left = module.GlobalHydra.instance().is_initialized()
        module.GlobalHydra.instance().clear()
        assert not left, "the test left Hydra initialized"


@pytest.fixture
def fashion_mnist() -> Path:
    """Return the folder of Fashion-MNIST, or skip with the line that installs it."""
    if not FASHION_MNIST.is_file():
        pytest.skip("Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")
    return FASHION_MNIST.parent
