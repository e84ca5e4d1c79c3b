"""`mil measure`: models side by side, and what makes them comparable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mil_cli.cli.main import main
from mil_cli.cli.subjects import Subject, feeds_for, signature
from mil_cli.errors import ModelError


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
