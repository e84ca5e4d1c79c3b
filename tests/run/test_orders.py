"""Every order of the four families either runs to an exported file, or is refused with the reason before it begins."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.events import SilentProgress
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.models.resnet import resnet20
from mil_cli.run.cache import Cache
from mil_cli.run.execute import CapturedModel, Executor
from mil_cli.stages.registry import StageConfig, check_order, config_type
from tests.run.toys import toy_surroundings

FAMILIES = ("nas", "prune", "distill", "quantize")
ORDERS = list(itertools.permutations(FAMILIES))
LEGAL = [order for order in ORDERS if order.index("quantize") > max(order.index("nas"), order.index("prune"))]
STAGES: dict[str, StageConfig] = {
    "nas": config_type("nas", "elastic")(
        macs=0.6, evaluations=2, population=2, search_samples=64, recalibrate_samples=64, importance_samples=32
    ),
    "prune": config_type("prune", "magnitude")(macs=0.6, recalibrate_samples=64),
    "distill": config_type("distill", "soft_labels")(),
    "quantize": config_type("quantize", "static")(calibration_samples=64),
}


def first(split: Any, count: int) -> TensorSplit:
    images, labels = next(iter(split.batches(count)))
    return TensorSplit((images, labels))


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Executor, CapturedModel]:
    """One cache for all orders, so that those that begin alike compute that once."""
    full = digits()
    data = Data(name="few digits", train=first(full.train, 256), val=first(full.val, 64), test=first(full.test, 64))
    torch.manual_seed(0)
    net = Model.capture(resnet20(width=16, blocks=2).eval(), (torch.randn(2, 1, 8, 8),))
    original = CapturedModel(net)
    around = replace(toy_surroundings(data=data, stages=STAGES), original=original)
    progress = SilentProgress()
    return Executor(around, Cache(tmp_path_factory.mktemp("cache"), progress), False, progress), original


@pytest.mark.slow  # quick is that of the quickstart
@pytest.mark.parametrize("order", LEGAL, ids="-".join)
def test_a_legal_order_ends_in_a_file_that_computes_the_same(
    order: tuple[str, ...], executor: tuple[Executor, CapturedModel], tmp_path: Path
) -> None:
    runner, original = executor
    assert check_order([(name, STAGES[name]) for name in order]) == []
    model: Any = original
    for name in order:
        model = runner.run(name, STAGES[name], model).model
    final: Model = model.load()
    assert final.macs() < 0.4 * original.load().macs()
    assert any(op_name(node) == "quantize_affine" for node in calls(final.graph))
    path = export_onnx(final, tmp_path / "model.onnx").path
    batch = next(iter(runner.surroundings.data.val.batches(32)))
    check_parity(final, path, [runner.surroundings.task.inputs(batch)], threads=1)


@pytest.mark.parametrize("order", [order for order in ORDERS if order not in LEGAL], ids="-".join)
def test_an_illegal_order_is_refused_with_the_reason(order: tuple[str, ...]) -> None:
    problems = check_order([(name, STAGES[name]) for name in order])
    assert problems
    assert all("cannot follow 'quantize'" in str(problem) and "widths" in str(problem) for problem in problems)
