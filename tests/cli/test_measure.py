"""`mil measure`: models side by side, and what makes them comparable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from mil_cli.cli.main import main
from mil_cli.cli.subjects import Subject, feeds_for, signature
from mil_cli.errors import ModelError
from mil_cli.export.onnx import export_onnx
from mil_cli.graph.capture import capture


def write_onnx(path: Path, *, inputs: dict[str, tuple[int, list[int | str]]]) -> Path:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    first = next(iter(inputs))
    output = helper.make_tensor_value_info("y", inputs[first][0], inputs[first][1])
    graph = helper.make_graph([helper.make_node("Identity", [first], ["y"])], "g", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_free_axes_are_one_and_types_are_kept(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "m.onnx", inputs={"x": (TensorProto.FLOAT, ["batch", 3]), "ids": (TensorProto.INT64, ["batch"])}
    )
    assert signature(path) == {"x": ((1, 3), np.dtype(np.float32)), "ids": ((1,), np.dtype(np.int64))}
    feeds = feeds_for([Subject("m", path, None)])
    assert feeds["x"].shape == (1, 3)
    assert feeds["x"].dtype == np.float32
    assert feeds["ids"].tolist() == [0]


def test_inputs_that_are_no_tensors_are_told(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_sequence_value_info("images", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("place", TensorProto.INT64, []),
    ]
    node = helper.make_node("SequenceAt", ["images", "place"], ["y"])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="images is no tensor"):
        signature(tmp_path / "m.onnx")


def test_free_axes_take_the_length_that_is_asked_for(tmp_path: Path) -> None:
    shape: list[int | str] = ["batch", "length", 3, "length"]
    path = write_onnx(
        tmp_path / "m.onnx", inputs={"x": (TensorProto.FLOAT, shape), "ids": (TensorProto.INT64, ["batch", "words"])}
    )
    feeds = feeds_for([Subject("m", path, None)], {"length": 5})
    assert feeds["x"].shape == (1, 5, 3, 5)
    assert feeds["ids"].shape == (1, 1)


def test_a_real_sample_is_repeated_or_cut_along_a_free_axis(tmp_path: Path) -> None:
    module = nn.Conv1d(2, 3, 1).eval()
    sample = torch.arange(8.0).reshape(1, 2, 4)
    model = capture(module, (sample,), dynamic={"input": {0: "batch", 2: "frames"}})
    path = export_onnx(model, tmp_path / "m.onnx").path
    feeds = feeds_for([Subject("m", path, model)], {"frames": 6})
    assert feeds["input"][0].tolist() == [[0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5]]
    assert feeds_for([Subject("m", path, model)], {"frames": 2})["input"][0].tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize("word", ["length", "length=", "=3", "length=0", "length=x", "lenght=3", "batch=2"])
def test_a_wrong_axis_is_refused(
    tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_onnx(tmp_path / "m.onnx", inputs={"x": (TensorProto.FLOAT, ["batch", "length"])})
    assert main(["measure", "m.onnx", "--axis", word]) == 2
    assert "--axis" in capsys.readouterr().err


def test_models_with_other_inputs_are_not_compared(tmp_path: Path) -> None:
    one = write_onnx(tmp_path / "one.onnx", inputs={"x": (TensorProto.FLOAT, [1, 3])})
    two = write_onnx(tmp_path / "two.onnx", inputs={"z": (TensorProto.FLOAT, [1, 3])})
    with pytest.raises(ModelError) as caught:
        feeds_for([Subject("one", one, None), Subject("two", two, None)])
    assert "two" in str(caught.value)


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_onnx(tmp_path / "one.onnx", inputs={"x": (TensorProto.FLOAT, [1, 300])})
    write_onnx(tmp_path / "two.onnx", inputs={"x": (TensorProto.FLOAT, [1, 300])})
    assert main(["measure", "two.onnx", "--against", "one.onnx", "--json", "deep/figures.json"]) == 0
    shown = capsys.readouterr().out
    assert "one.onnx" in shown
    content = json.loads(Path("deep/figures.json").read_text())
    assert [model["name"] for model in content["models"]] == ["one.onnx", "two.onnx"]
    first, second = (model["measurement"] for model in content["models"])
    assert first["latency_ms"]["ratio_to_baseline"] == 1.0
    assert second["size_bytes"] == Path("two.onnx").stat().st_size
    assert second["latency_ms"]["p50"] > 0
    assert second["quality"] is None
