"""Distillation without the data as a recipe has it: the cache, other data by the recipe's settings, the dry run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mil_cli.data.base import Batch
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError, RecipeErrors
from mil_cli.events import SilentProgress
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.run.cache import Cache
from mil_cli.run.plan import _Head, plan_recipe
from mil_cli.run.runner import run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.distill.unlabelled import UnlabelledConfig

RECIPE = """
defaults:
  - /mil/defaults
  - /task: classification
  - /device: host_cpu
  - /stage/distill@stages.other: unlabelled
  - /stage/distill@stages.none: data_free
  - _self_
model: {_target_: model.build}
data: {_target_: data.build}
baseline: null
goals: {size: {max_ratio: 9}}
stages:
  other: {data: {_target_: data.build, seed: 5}}
  none: {student: {_target_: model.build, width: 4}, samples: 4096, every: 2, warmup: 2, width: 4, bank: 64}
chain: [other, none]
trainer: {epochs: 2, batch_size: 16}
"""

MODEL = """
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
    )
"""

DATA = """
import torch

def build(seed=0, shift=0):
    def split(n, kind):
        g = torch.Generator().manual_seed(10 * seed + kind)
        return torch.randn(n, 1, 8, 8, generator=g), torch.randint(0, 10, (n,), generator=g)
    images, labels = split(640, 0)
    return {"train": (images + shift, labels), "val": split(32, 1), "test": split(32, 2)}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in {"recipe.yaml": RECIPE, "model.py": MODEL, "data.py": DATA}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def _cached(folder: Path, *overrides: str) -> list[str]:
    small = ["stages.none.samples=64", *overrides]
    recipe = load_recipe(folder / "recipe.yaml", small)
    with importable(recipe.root):
        cache = Cache(folder / "cache", SilentProgress())
        around = build_surroundings(recipe)
        chain = run_chain(recipe, around, cache=cache, fresh=False, progress=SilentProgress())
    return [result.name for result in chain.results if result.cached]


@pytest.mark.slow
def test_other_data_recompute_what_learned_from_them_and_the_recipes_own_do_not(project: Path) -> None:
    assert _cached(project) == []
    assert _cached(project) == ["other", "none"]
    assert _cached(project, "data.shift=1") == ["other", "none"]
    assert _cached(project, "stages.other.data.shift=1") == []


def test_other_data_come_from_a_group_of_the_recipes_defaults(project: Path) -> None:
    lines = "  - /stage/distill@stages.other: unlabelled\n"
    changed = RECIPE.replace(lines, lines + "  - /data@stages.other.data: digits\n").replace("  other: {data: ", "  # ")
    (project / "recipe.yaml").write_text(changed)
    config = cast("UnlabelledConfig", load_recipe(project / "recipe.yaml", []).stages["other"])
    assert config.data is not None
    assert config.data["_target_"] == "mil_cli.data.digits.digits"
    (project / "recipe.yaml").write_text(RECIPE.replace("  other: {data: ", "  # "))
    with pytest.raises(RecipeErrors, match=r"stages\.other: .*give data"):
        load_recipe(project / "recipe.yaml", [])


def test_settings_that_are_no_data_are_refused(project: Path) -> None:
    around = build_surroundings(load_recipe(project / "recipe.yaml", []))
    for settings in ("images", {"root": "images"}):
        with pytest.raises(DataError, match="no settings of data"):
            around.load_data(settings)


def test_the_dry_run_is_short_and_scales_what_it_saw(project: Path) -> None:
    ticks = itertools.count()
    plan = plan_recipe(load_recipe(project / "recipe.yaml", []), progress=SilentProgress(), clock=lambda: next(ticks))
    assert [stage.method for stage in plan.stages] == ["unlabelled", "data_free"]
    # On a clock that only counts its readings, each of an epoch's 256 batches is some of them.
    assert plan.stages[1].seconds > 256


@dataclass
class _Making:
    """A split that takes 5 to make a batch."""

    clock: _Clock

    def __len__(self) -> int:
        return 1000

    def batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        for _ in range(1000 // batch_size):
            self.clock.now += 5
            yield ()

    def fingerprint(self) -> str:
        return ""


@dataclass
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("made", "seconds"), [(False, 2 * 3.0), (True, 2 * 8.0)])
def test_the_time_of_a_shortened_split_is_that_of_its_user_and_of_making_it(made: bool, seconds: float) -> None:
    clock = _Clock()
    head = _Head(_Making(clock), clock, 20, made)
    batches = head.batches(10)
    for _ in range(2):
        next(batches)
        clock.now += 3
    batches.close()  # type: ignore[attr-defined]
    assert head.growth == 50
    assert head.take_seconds() == seconds
    assert head.take_seconds() == 0


def test_parts_of_a_shortened_split_are_read_side_by_side_and_count_once() -> None:
    clock = _Clock()
    head = _Head(TensorSplit((torch.arange(1000),)), clock, 20)
    pair = [head.part(torch.arange(start, start + 10)).batches(5) for start in (0, 10)]
    for _ in range(2):
        for batches in pair:
            next(batches)
        clock.now += 3
    for batches in pair:
        batches.close()  # type: ignore[attr-defined]
    assert head.growth == 50
    assert head.take_seconds() == 6
    assert head.take_seconds() == 0
