"""What a change recomputes: exactly the stages that read what was changed, through a recipe as a user has it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import run_chain
from mil_cli.run.surroundings import build_surroundings

RECIPE = """
defaults:
  - /mil/defaults
  - /device: host_cpu
  - /stage/prune@stages.cut: magnitude
  - /stage/distill@stages.learn: soft_labels
  - /stage/quantize@stages.round: static
  - _self_
model: {_target_: model.build, checkpoint: trained.pt}
data: {_target_: data.build}
task: {_target_: task.Task}
trainer: {epochs: 1, batch_size: 16}
goals: {size: {max_ratio: 0.9}}
stages:
  cut: {macs: 0.6}
  learn: {teacher: teacher.pt2}
chain: [cut, learn, round]
"""

MODEL = """
from torch import nn

def build(width=32):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
"""

DATA = """
import torch

def build(seed=0):
    generator = torch.Generator().manual_seed(seed)
    def split(samples):
        features = torch.randn(samples, 8, generator=generator)
        return features, (features[:, 0] > 0).long()
    return {"train": split(64), "val": split(32), "test": split(32)}
"""

TASK = """
from torch.nn import functional
from helper import SCALE

class Task:
    def loss(self, outputs, batch):
        return SCALE * functional.cross_entropy(outputs, batch[1])

    def distance(self, student, teacher, batch, *, temperature):
        return functional.mse_loss(student / temperature, teacher / temperature)
"""


def network(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))


def write_teacher(folder: Path, seed: int) -> None:
    Model.capture(network(seed), (torch.randn(4, 8),)).save(folder / "teacher.pt2")


def write_unread(folder: Path) -> None:
    (folder / "unused.py").write_text("X = 1\n")
    (folder / "README.md").write_text("text\n")


def write_checkpoint(folder: Path, seed: int) -> None:
    torch.save(network(seed).state_dict(), folder / "trained.pt")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the project and a cache that one run has filled."""
    folder = tmp_path_factory.mktemp("reuse")
    project = folder / "project"
    project.mkdir()
    files = {"recipe.yaml": RECIPE, "model.py": MODEL, "data.py": DATA, "task.py": TASK, "helper.py": "SCALE = 1.0\n"}
    for name, text in files.items():
        (project / name).write_text(text)
    write_teacher(project, 1)
    write_checkpoint(project, 2)
    assert cached_stages(folder) == []
    return folder


def cached_stages(folder: Path, *overrides: str) -> list[str]:
    """Run the chain and return the stages that were taken from the cache."""
    recipe = load_recipe(folder / "project" / "recipe.yaml", list(overrides))
    with importable(recipe.root):
        cache = Cache(folder / "cache", SilentProgress())
        around = build_surroundings(recipe)
        chain = run_chain(recipe, around, cache=cache, fresh=False, progress=SilentProgress())
    return [result.name for result in chain.results if result.cached]


ALL = ["cut", "learn", "round"]

FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "teacher file": (lambda folder: write_teacher(folder, 3), ["cut"]),
    "checkpoint bytes": (lambda folder: write_checkpoint(folder, 4), []),
    "helper module of the task": (lambda folder: (folder / "helper.py").write_text("SCALE = 2.0\n"), []),
    "data": (lambda folder: (folder / "data.py").write_text(DATA.replace("seed=0", "seed=1")), []),
    "files that nobody reads": (write_unread, ALL),
}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file(first: Path, tmp_path: Path, name: str) -> None:
    change, expected = FILES[name]
    folder = tmp_path / "moved"  # where the project lies must not matter either
    shutil.copytree(first, folder)
    change(folder / "project")
    assert cached_stages(folder) == expected


SETTINGS: dict[str, list[str]] = {
    # Its only reader cuts to the same widths with it, so what comes after finds its input unchanged.
    "device.preferred_multiple.float=16": ["learn", "round"],
    "device.int8.reduce_range=true": ["cut", "learn"],
    "trainer.learning_rate=0.01": ["cut"],
    "stages.learn.temperature=2": ["cut"],
    "stages.round.observer=min_max": ["cut", "learn"],
    "seed=1": [],
}


def test_settings_that_no_stage_reads(first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(first, folder)
    assert cached_stages(folder, "device.price_per_hour=2", "goals.size.max_ratio=0.8", "measure.rounds=61") == ALL


@pytest.mark.parametrize("override", SETTINGS)
def test_a_changed_setting(first: Path, tmp_path: Path, override: str) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(first, folder)
    assert cached_stages(folder, override) == SETTINGS[override]


def test_a_teachers_code_is_part_of_its_fingerprint_and_what_else_was_loaded_is_not(
    first: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(first, folder)
    project = folder / "project"
    code = {"teacher.py": MODEL.replace("from torch", "from parts import GAIN\nfrom torch"), "parts.py": "GAIN = 1\n"}
    for name, text in code.items():
        (project / name).write_text(text)
    recipe = load_recipe(project / "recipe.yaml")
    with importable(recipe.root):
        around = build_surroundings(recipe)
        file = around.source_fingerprint("teacher.pt2")
        teacher, nested = ({"_target_": "teacher.build"}, {"_target_": "model.build", "width": {"_target_": "parts.f"}})
        (project / "parts.py").write_text("GAIN = 1\ndef f(): return 8\n")
        before = [around.source_fingerprint(teacher), around.source_fingerprint(nested)]
        assert around.source_fingerprint("teacher.pt2") == file
        (project / "parts.py").write_text("GAIN = 2\ndef f(): return 9\n")
        after = [around.source_fingerprint(teacher), around.source_fingerprint(nested)]
    assert all(one != other for one, other in zip(before, after, strict=True))
