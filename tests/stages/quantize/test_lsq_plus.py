"""LSQ+: offsets that are learned on the grid of zero points, and files that compute what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_attribute, op_name
from mil_cli.stages.quantize.lsq_plus import LsqPlusConfig, quantize, three_sigma_scale
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settle import settle
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.registry import config_type, function_of
from tests.stages.quantize.striped import accuracy, context, images, loss, quantizers


def config(**settings: Any) -> LsqPlusConfig:
    return LsqPlusConfig(**{"weight_bits": 3, "activation_bits": 3, "batch_norm_samples": 256, **settings})


def with_offset(model: Model) -> list[Any]:
    return [node for node in calls(model.graph) if op_name(node) == "quantize_offset"]


def test_offsets_are_learned_where_values_go_below_zero(
    smooth: Model, data: Data, inserted: dict[str, Model], tmp_path: Path
) -> None:
    settings = config(first_last_bits=3, trainer={"epochs": 2, "learning_rate": 0.05})
    result = quantize(smooth, settings, context(data))
    start, trained = inserted["start"], inserted["trained"]
    offsets = with_offset(trained)
    assert {"silu", "placeholder"} < {op_name(node.args[0]) for node in with_offset(start)}
    assert [op_name(node.args[0]) for node in quantizers(trained) if node.args[0].op != "get_attr"] == ["relu"]
    moved = 0
    for node in offsets:
        scale = get_attribute(trained.graph, str(node.args[1].args[0].target)).detach().abs()
        offset = get_attribute(trained.graph, str(node.args[2].target)).detach()
        before = get_attribute(start.graph, str(node.args[2].target)).detach()
        moved += int(before != offset)
        expected = min(max(round(float(-offset / scale)), 0), node.args[-1])
        zero_point = get_attribute(result.graph, str(node.args[2].target).replace(".offset", ".zero_point"))
        assert int(zero_point) == expected
    assert moved == len(offsets)
    with torch.no_grad():
        before_settling = trained(images(data.val))
        settle(trained.graph)
        assert torch.equal(trained(images(data.val)), before_settling)
    static = quantize_static(smooth, StaticConfig(weight_bits=3, activation_bits=3, first_last_bits=3), context(data))
    assert [op_name(node) for node in calls(result.graph)] == [op_name(node) for node in calls(static.graph)]
    found, wanted = (sorted(tuple(value.shape) for value in net.state_dict().values()) for net in (result, static))
    assert found == wanted
    path = export_onnx(result, tmp_path / "model.onnx").path
    assert integer_coverage(path).float_layers == ()
    check_parity(result, path, [((images(data.val),), {})])


def test_it_learns_what_rounding_alone_loses(smooth: Model, data: Data) -> None:
    low = {"weight_bits": 2, "activation_bits": 2, "first_last_bits": 2}
    result = quantize(smooth, config(**low, trainer={"epochs": 4}), context(data))
    rounded = quantize_static(smooth, StaticConfig(**low), context(data))
    assert loss(result, data) < 0.7 * loss(rounded, data)
    assert accuracy(result, data) > accuracy(smooth, data) - 0.1


def test_three_sigma_start_is_the_formula_of_the_paper() -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [1.0], [-2.0], [0]])
    found = three_sigma_scale(weight, axis=0, codes=CodeRange(-8, 7))
    for row, scale in zip(weight, found, strict=True):
        mean, deviation = float(row.mean()), float(row.std(correction=0))
        assert float(scale) == pytest.approx(max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2**3)
    assert three_sigma_scale(weight, axis=None, codes=CodeRange(-2, 1)).shape == ()
    assert config_type("quantize", "lsq_plus") is LsqPlusConfig
    assert function_of(LsqPlusConfig()) is quantize
