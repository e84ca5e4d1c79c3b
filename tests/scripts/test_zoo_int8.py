"""The zoo's quantization: a sound model passes, a wrong file is found, the page says what stays float and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.export.onnx import ExportedFile, export_onnx
from mil_cli.graph.model import Model
from scripts.pool import append_row
from scripts.zoo import __main__ as zoo
from scripts.zoo.int8 import STEPS, TOLERANCE, check
from scripts.zoo.int8_reasons import why_float
from scripts.zoo.int8_table import page
from scripts.zoo.sample import Sample
from scripts.zoo.table import outcome

TOYS = "tests.scripts.test_zoo_int8"


class Toy(nn.Module):
    """Convolutions, a sum, a gate, a transposed convolution, which has no integer kernel, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.body(x)
        x = self.up(x * torch.sigmoid(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


def names() -> list[str]:
    return ["toy"]


def build(name: str) -> Sample:
    torch.manual_seed(0)
    return Sample(Toy(), (torch.randn(2, 3, 8, 8),))


def checked() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    check(f"{TOYS}:toy", lambda row: rows.append(json.loads(json.dumps(row))))
    return rows[-1]


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return checked()


def test_a_sound_model_passes_every_step(row: dict[str, Any]) -> None:
    assert outcome(row) == "pass", row
    assert set(row["seconds"]) == set(STEPS)
    assert row["integer"] == {"QGemm": 1, "QLinearConv": 2}
    assert list(row["kept_float"]) == ["up"]
    assert row["float_operators"]["Sigmoid"] == 1
    assert 0 < row["difference"] < TOLERANCE
    assert row["difference"] < row["rounding"] < 0.1
    assert row["difference"] <= row["writing"] + row["kernels"]


@pytest.mark.slow
def test_a_wrong_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: Model, path: Path, **settings: Any) -> ExportedFile:
        wrong = model.clone()
        with torch.no_grad():
            wrong.graph.get_parameter("head.bias").add_(torch.arange(5.0))
        return export_onnx(wrong, path, **settings)

    monkeypatch.setattr("scripts.zoo.int8.export_onnx", spoilt)
    assert list(checked()["failed"]) == ["agree"]


def test_the_page_says_what_stays_float_and_why(row: dict[str, Any], tmp_path: Path) -> None:
    failed = {"name": "scripts.zoo.timm_families:odd", "failed": {"export": "ExportError: no | such"}, "original": {}}
    for each in (row, failed):
        append_row(tmp_path / "rows.jsonl", each)
    files = ["--rows", str(tmp_path / "rows.jsonl"), "--catalogues", TOYS]
    assert zoo.main([*files, "--int8"]) == 0
    text = (tmp_path / "rows.md").read_text()
    assert text == page([row, failed], zoo._versions(), total=2)
    assert "2 of 2 models run: **1 pass**, 1 fail" in text
    assert "| timm odd | export | ExportError: no \\| such |" in text
    assert "1: onnxruntime has no integer kernel for transposed convolutions" in text
    assert "1 Sigmoid" in text
    assert "Sigmoid: activation functions stay float" in text
    assert "no reason known" not in text
    assert "| 3/4 |" in text  # the transposed convolution counts among the layers


def test_no_reason_is_made_up() -> None:
    assert why_float("Frobnicate", "cnn") is None
    assert why_float("Mul", "cnn") != why_float("Mul", "transformer")
