"""Every built-in model through capture, archive and ONNX, in both directions that a user takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import OnnxModel
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, build_model, build_module
from mil_cli.spaces.largest import largest

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in ("convnet", "small_nets") else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_nothing_is_lost(path: Path, tmp_path: Path) -> None:
    source = ModelSource.model_validate(yaml.safe_load(path.read_text()))
    side = 8 if path.stem == "convnet" else 28
    x = torch.randn(7, 1, side, side, generator=torch.Generator().manual_seed(0))
    eager = largest(build_module(source, root=tmp_path, seed=4)).eval()
    model = build_model(source, root=tmp_path, example=((x[:3],), {}), seed=4)
    model.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    assert loaded.fingerprint() == model.fingerprint()
    with torch.no_grad():
        expected = eager(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(loaded(x), expected)
    export_onnx(loaded, tmp_path / "model.onnx")
    for batch in (1, 7):
        found = OnnxModel(tmp_path / "model.onnx", loaded.spec)(x[:batch])
        assert (found - expected[:batch]).abs().max() < 1e-4
