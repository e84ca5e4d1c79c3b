"""The recipes on photographs: their data and task are what they say, their nets are cut with proof, and both run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from mil_cli.cli.main import main
from mil_cli.data.base import Data
from mil_cli.data.source import build_data
from mil_cli.errors import DataError, ModelError
from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import OnnxModel
from mil_cli.graph.coupling import analyse, check_equivalence, cut, repair
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, build_model
from mil_cli.models.user_code import call_target
from mil_cli.task.source import build_task

RECIPES = Path(__file__).parents[2] / "recipes"
HRNET = {"width": 8, "branches": 3, "blocks": 1, "stem": 8}
PYNET = {"width": 16, "levels": 2}
SAMPLES = {"train_samples": 48, "val_samples": 16, "test_samples": 16}


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes(), 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with smooth pictures in train, val and test, and ten kinds of bars as Fashion-MNIST."""
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (folder / split).mkdir()
        for index in range(2):
            coarse = images.fromarray(generator.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            coarse.resize((120, 96), images.Resampling.BICUBIC).save(folder / split / f"{index}.png")
    for name, samples in (("train", 10_060), ("t10k", 40)):
        kinds = np.arange(samples) % 10
        bars = np.zeros((samples, 28, 28), dtype=np.uint8)
        for kind in range(10):
            bars[kinds == kind, 2:-2, 2 : 6 + 2 * kind] = 120 + 13 * kind
        bars[0, 10, 10] = 255
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", bars)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", kinds)
    return folder


def data(recipe: str, files: Path, **settings: Any) -> Data:
    folder = {"folder": str(files)} if recipe == "hrnet" else {}
    config = {"_target_": "data.build", "root": str(files), **folder, **SAMPLES, **settings}
    return build_data(config, RECIPES / recipe)


def captured(recipe: str, files: Path, **settings: Any) -> tuple[Model, list[Tensor]]:
    """Return the model of a recipe with statistics that are no defaults, and inputs of it."""
    inputs = [batch[0] for batch in data(recipe, files).val.batches(8)]  # type: ignore[index]
    source = ModelSource.model_validate({"_target_": "model.build", **settings})
    model = build_model(source, root=RECIPES / recipe, example=((inputs[0],), {}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.graph.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model, inputs


@pytest.mark.parametrize("recipe", ["hrnet", "pynet"])
def test_the_splits_are_fixed_and_training_is_drawn_anew(recipe: str, files: Path) -> None:
    first, second = data(recipe, files), data(recipe, files)
    for name in ("train", "val", "test"):
        assert getattr(first, name).fingerprint() == getattr(second, name).fingerprint()

    def drawn(**settings: Any) -> Tensor:
        return next(iter(first.train.batches(8, **settings)))[0]  # type: ignore[index,no-any-return]

    assert torch.equal(drawn(augment=True, seed=1, epoch=2), drawn(augment=True, seed=1, epoch=2))
    assert not torch.equal(drawn(augment=True, seed=1, epoch=2), drawn(augment=True, seed=1, epoch=3))
    assert torch.equal(drawn(epoch=2), drawn(epoch=3))


def test_scenes_are_labelled_where_garments_lie(files: Path) -> None:
    """Two scenes of the same random choices before white and black differ exactly where no garment lies."""
    scenes = call_target(
        {"_target_": "data.Scenes", "samples": 1, "size": 64},
        root=RECIPES / "hrnet",
        where="data",
        error=DataError,
        extra={"backgrounds": [], "garments": torch.ones(4, 28, 28), "kinds": torch.arange(4)},
    )
    drawn = {}
    for value in (0, 255):
        torch.manual_seed(5)
        scenes._backgrounds = [torch.full((3, 70, 80), value, dtype=torch.uint8)]
        drawn[value] = [scenes[0] for _ in range(50)]
    kinds = set()
    for (black, labels), (white, again) in zip(drawn[0], drawn[255], strict=True):
        assert torch.equal(labels, again)
        assert torch.equal((black != white).all(0), labels == 0)
        assert (float(black.min()), float(white.max())) == (-1.0, 1.0)
        kinds |= set(labels.unique().tolist())
        assert 22 * 22 <= int((labels > 0).sum()) <= 3 * 40 * 40  # one to three garments, all inside
    assert kinds == {0, 1, 2, 3, 4}


def test_the_sensors_readings_have_the_mean_and_the_noise_of_its_formula() -> None:
    photograph = torch.tensor([0.9, 0.6, 0.3])[:, None, None].expand(3, 400, 400)
    torch.manual_seed(0)
    readings = call_target(
        {"_target_": "data.expose"},
        root=RECIPES / "pynet",
        where="data",
        error=DataError,
        extra={"photograph": photograph},
    )
    assert readings.shape == (1, 400, 400)
    for place, channel in {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}.items():
        plane = readings[0, place[0] :: 2, place[1] :: 2]
        light = (0.9, 0.6, 0.3)[channel] ** 2.2 / (2.0, 1.0, 1.6)[channel]
        assert float(plane.mean()) == pytest.approx(light, rel=0.01)
        assert float(plane.std()) == pytest.approx((0.004 * light + 0.008**2) ** 0.5, rel=0.03)


def test_each_level_learns_the_photograph_of_its_size() -> None:
    task = build_task({"_target_": "task.Pyramid", "coarse_weight": 0.25}, RECIPES / "pynet")
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    photograph = coarse.repeat_interleave(4, -1).repeat_interleave(4, -2)
    outputs = {"image": photograph + 0.1, "half": coarse.repeat_interleave(2, -1).repeat_interleave(2, -2) - 0.2}
    outputs["quarter"] = coarse + 0.4
    batch = (torch.zeros(2, 1, 16, 16), photograph)
    assert float(task.loss(outputs, batch)) == pytest.approx(0.1 + 0.25 * (0.2 + 0.4), rel=1e-5)
    teacher = {name: image + 0.3 for name, image in outputs.items()}
    assert float(task.distance(outputs, teacher, batch, temperature=1.0)) == pytest.approx(0.3 * 1.5, rel=1e-5)
    metric = task.metric()
    task.update(metric, {**outputs, "image": (photograph + 0.1).clamp(max=2)}, (batch[0], photograph * 0 + 0.5))
    error = ((photograph + 0.1).clamp(0, 1) - 0.5) ** 2
    assert float(metric.compute()) == pytest.approx(float(-10 * error.mean((1, 2, 3)).log10().mean()), rel=1e-4)
    assert task.higher_is_better


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), [("hrnet", HRNET), ("pynet", PYNET)])
def test_the_net_is_cut_with_proof_and_exported(
    recipe: str, settings: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    model, inputs = captured(recipe, files, **settings)
    coupling = analyse(model)
    assert coupling.unknown == ()
    assert coupling.cuttable_share > 0.9
    generator = np.random.default_rng(0)
    removed = repair(
        coupling,
        {
            number: set(generator.choice(space.free, len(space.free) // 2, replace=False).tolist())
            for number, space in enumerate(coupling.spaces)
        },
    )
    smaller = cut(model, coupling, removed)
    report = check_equivalence(model, coupling, removed, smaller, [((x,), {}) for x in inputs])
    assert report.equivalent
    assert report.compacted == ()
    counts = [sum(value.numel() for _, value in each.named_parameters()) for each in (model, smaller)]
    assert counts[1] < 0.4 * counts[0]
    export_onnx(smaller, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = smaller(inputs[0])
    found = OnnxModel(tmp_path / "model.onnx", smaller.spec)(inputs[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_pynet_of_impossible_sizes_is_told(files: Path) -> None:
    with pytest.raises(ModelError, match="1 to 4 levels"):
        captured("pynet", files, levels=5)
    with pytest.raises(DataError, match=r"data\.size"):
        data("pynet", files, size=33)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), [("hrnet", HRNET), ("pynet", PYNET)])
def test_the_recipe_runs(recipe: str, settings: dict[str, Any], files: Path, tmp_path: Path) -> None:
    shrunk = {
        **{f"model.{key}": value for key, value in settings.items()},
        **{f"data.{key}": value for key, value in SAMPLES.items()},
        "data.root": files,
        "trainer.epochs": 1,
        "trainer.batch_size": 8,
        "stages.recover.trainer.epochs": 1,
        "stages.prune.round_to": 1,
        "stages.prune.latency": "null",
        "stages.prune.macs": 0.6,
        "goals.macs.max_ratio": 0.6,
    }
    if recipe == "hrnet":
        shrunk |= {"data.folder": files, "stages.prune.points": 2, "stages.prune.search_samples": 16}
    else:
        shrunk["stages.prune.steps"] = 1
    arguments = [f"{key}={value}" for key, value in shrunk.items()]
    out = tmp_path / "run"
    command = ["compress", str(RECIPES / recipe / "recipe.yaml"), *arguments, "~goals.quality", "~goals.latency"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["goals_met"]
    assert report["final"]["macs"] <= 0.6 * report["baseline"]["macs"]
    assert report["final"]["quality"]["metric"] == {"hrnet": "mean IoU", "pynet": "PSNR"}[recipe]
    sessions = [onnxruntime.InferenceSession(out / name) for name in ("baseline.onnx", "model.onnx")]
    outputs = [[(value.name, value.shape) for value in session.get_outputs()] for session in sessions]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == {"hrnet": 1, "pynet": 3}[recipe]
