"""The recipe of super-resolution: its pairs, its net, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mil_cli.cli.main import main
from mil_cli.data.base import Data
from mil_cli.data.source import build_data
from mil_cli.errors import DataError
from mil_cli.models.source import ModelSource, build_module
from mil_cli.models.user_code import call_target

RECIPE = Path(__file__).parents[2] / "recipes" / "super_resolution"
SAMPLES = {"train_samples": 32, "val_samples": 8, "test_samples": 8, "size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return photographs in train, val and test: smooth pictures, half of each without any detail."""
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    root = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / split).mkdir()
        coarse = images.fromarray(generator.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        picture = np.array(coarse.resize((160, 128), images.Resampling.BICUBIC))
        picture[:, :80] = 200
        images.fromarray(picture).save(root / split / "picture.png")
    return root


def data(folder: Path, **settings: Any) -> Data:
    return build_data({"_target_": "data.build", "root": str(folder), **SAMPLES, **settings}, RECIPE)


def module(**settings: Any) -> nn.Module:
    made = build_module(ModelSource.model_validate({"_target_": "model.build", **settings}), root=RECIPE, seed=0)
    assert isinstance(made, nn.Module)
    return made


def halved(photograph: Tensor) -> Tensor:
    made = call_target(
        {"_target_": "data.halved"}, root=RECIPE, where="data", error=DataError, extra={"photograph": photograph}
    )
    assert isinstance(made, Tensor)
    return made


def test_val_and_test_are_fixed_and_hold_detail(folder: Path) -> None:
    first, second = data(folder), data(folder)
    for name in ("train", "val", "test"):
        assert getattr(first, name).fingerprint() == getattr(second, name).fingerprint()
    small, large = next(iter(first.test.batches(8)))  # type: ignore[misc]
    assert (small.shape, large.shape) == ((8, 3, 16, 16), (8, 3, 32, 32))
    assert float(large.flatten(1).std(1).min()) > 0.1  # of crops drawn at random a third would be plain


def test_halving_keeps_what_is_smooth_and_drops_what_is_too_fine() -> None:
    rows = torch.linspace(0.2, 0.8, 64)
    ramp = rows[None, :, None].expand(3, 64, 64)
    # The bicubic kernel reproduces straight lines: each pixel is the mean of the two that it stands for.
    expected = rows.view(32, 2).mean(1)
    assert float((halved(ramp)[:, 4:-4] - expected[None, 4:-4, None]).abs().max()) < 1 / 255
    checks = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(3, 64, 64)
    assert float((halved(checks)[:, 4:-4, 4:-4] - 0.5).abs().max()) < 2 / 255


def test_a_net_without_details_interpolates() -> None:
    net = module(width=8, layers=1)
    nn.init.zeros_(net.last.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(net.last.bias)  # type: ignore[union-attr, arg-type]
    row = torch.rand(10, generator=torch.Generator().manual_seed(0))
    enlarged = net(row.expand(2, 3, 6, 10))
    assert enlarged.shape == (2, 3, 12, 20)
    # Keys' cubic kernel with a = -0.75, at the distances of a pixel that lies a quarter to the right of the fifth.
    near, far = [1.25 * d**3 - 2.25 * d**2 + 1 for d in (0.25, 0.75)], [1.25, 1.75]
    left, right = (-0.75 * (d**3 - 5 * d**2 + 8 * d - 4) for d in far)
    expected = left * row[3] + near[0] * row[4] + near[1] * row[5] + right * row[6]
    torch.testing.assert_close(enlarged[..., 9], expected.expand(2, 3, 12), rtol=0, atol=1e-6)


def test_the_net_is_as_small_as_its_recipe_says() -> None:
    assert sum(parameter.numel() for parameter in module().parameters()) == 50_604


@pytest.mark.parametrize("size", [33, 0])
def test_an_impossible_size_is_told(folder: Path, size: int) -> None:
    with pytest.raises(DataError, match=r"data\.size"):
        data(folder, size=size)


@pytest.mark.slow
def test_the_recipe_runs(folder: Path, tmp_path: Path) -> None:
    settings = {
        **{f"data.{key}": value for key, value in SAMPLES.items()},
        "data.root": folder,
        "model.width": 16,
        "model.layers": 2,
        "trainer.epochs": 2,
    }
    out = tmp_path / "run"
    arguments = [f"{key}={value}" for key, value in settings.items()]
    command = ["compress", str(RECIPE / "recipe.yaml"), *arguments, "~goals.quality", "~goals.size"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["final"]["quality"]["metric"] == "PSNR"
    for name in ("baseline.onnx", "model.onnx"):
        session = onnxruntime.InferenceSession(out / name)
        assert session.run(None, {"image": np.zeros((1, 3, 10, 14), np.float32)})[0].shape == (1, 3, 20, 28)
