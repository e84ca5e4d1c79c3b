"""The latency table: which operators a net has, how they are built and timed, and how well their sum predicts."""

from __future__ import annotations

import json
import random
import time
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.errors import MeasureError
from mil_cli.events import Bar, SilentProgress
from mil_cli.export.onnx import export_onnx
from mil_cli.graph.coupling import Counter, Coupling, analyse, cut, repair
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, module_stack
from mil_cli.measure.operators import Operator, OperatorLister, OperatorTable, table
from mil_cli.measure.operators.models import build
from mil_cli.measure.operators.operator import approximation, in_int8, make, unary
from mil_cli.measure.operators.table import OVERHEAD
from mil_cli.measure.process import run_job
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.stages.surroundings import Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig

IMAGES = (torch.zeros(2, 1, 28, 28),)
Analysed = tuple[Model, Coupling, Counter, OperatorLister]


def analysed(module: nn.Module) -> Analysed:
    model = Model.capture(module.eval(), IMAGES)
    coupling = analyse(model)
    counter = Counter(coupling)
    return model, coupling, counter, OperatorLister(counter)


@pytest.fixture(scope="module")
def resnet() -> Analysed:
    return analysed(resnet20(width=32, stem_stride=2))


@pytest.fixture(scope="module")
def transformer() -> Analysed:
    return analysed(vit())


def widths(coupling: Coupling, generator: random.Random, low: float, high: float) -> dict[int, set[int]]:
    """Return a cut that keeps a share of each space, in multiples of 8 where it is wide."""
    removed = {}
    for number, space in enumerate(coupling.spaces):
        kept = max(1, round(len(space.free) * generator.uniform(low, high)))
        kept = max(8, kept // 8 * 8) if len(space.free) >= 16 else kept
        removed[number] = set(space.free[kept:])
    return repair(coupling, removed)


class Notices(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.steps: list[tuple[str, int | None]] = []

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        self.steps.append((description, total))
        with super().work(description, total, done=done) as bar:
            yield bar

    def notice(self, text: str) -> None:
        self.notices.append(text)


def int8_form(**settings: Any) -> Int8Form:
    return Int8Form(activations="uint8", reduce_range=False, **settings)


def kinds(operators: Sequence[Operator]) -> Tally[str]:
    return Tally(operator.kind for operator in operators)


def optimized_operators(model: onnx.ModelProto, path: Path) -> Tally[str]:
    """Return how often each operator is in the graph that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Tally(node.op_type for node in onnx.load(path).graph.node)


def test_a_resnet_is_convolutions_a_mean_and_a_classifier(resnet: Analysed) -> None:
    _, _, _, lister = resnet
    operators = lister.operators({})
    assert kinds(operators) == {"conv": 21, "reduce": 1, "view": 1, "linear": 1}
    assert lister.approximated() == ()
    stem, head = operators[0], operators[-1]
    assert stem.shapes == ((1, 1, 28, 28), (32, 1, 3, 3))
    assert stem.elements == 32 * 14 * 14
    assert dict(stem.attributes) == {"stride": (2, 2), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    assert (head.shapes, head["gemm"], head["bias"]) == (((1, 128), (10, 128)), True, True)


def test_a_transformer_is_listed_as_the_runtime_runs_it(transformer: Analysed) -> None:
    _, _, _, lister = transformer
    found = kinds(lister.operators({}))
    assert (found["conv"], found["linear"], found["attention"], found["layer_norm"]) == (1, 17, 4, 9)
    assert found["binary"] == 9  # the positions, and two shortcuts in each block
    assert found["batch_norm"] == 0
    functions = Tally(operator["function"] for operator in lister.operators({}) if operator.kind == "unary")
    assert functions == {"Gelu": 4, "Relu": 12}  # the latter stand for taking queries, keys and values apart
    before_gelu = [operator for operator in lister.operators({}) if operator.shapes[-1] == (384, 96)]
    assert [operator["bias"] for operator in before_gelu] == [False] * 4


def test_a_mobilenet_keeps_additions_in_its_convolutions() -> None:
    module = mobilenet(widths=(16, 24), blocks=(1, 2), last=64)
    _, _, _, lister = analysed(module)
    operators = lister.operators({})
    convolutions = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    assert kinds(operators) == {"conv": convolutions, "reduce": 1, "view": 1, "linear": 1}
    depthwise = [operator for operator in operators if operator.kind == "conv" and operator["groups"] != 1]
    assert depthwise
    assert all(operator["groups"] == operator.shapes[1][0] for operator in depthwise)


def test_channels_that_are_no_multiple_of_four_pay_for_their_additions(resnet: Analysed) -> None:
    _, coupling, _, lister = resnet
    stage = next(number for number, space in enumerate(coupling.spaces) if space.origin == "stem.weight")
    found = kinds(lister.operators({stage: {0, 1}}))  # 30 channels
    assert found["binary"] == 3
    assert found["unary"] == 3  # the activations after them
    assert kinds(lister.operators({stage: set(range(4))}))["binary"] == 0


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_a_cut_has_the_operators_of_the_net_that_is_cut(name: str, request: pytest.FixtureRequest) -> None:
    model, coupling, _, lister = request.getfixturevalue(name)
    removed = widths(coupling, random.Random(0), 0.3, 0.9)
    narrow = OperatorLister(Counter(analyse(cut(model, coupling, removed))))
    assert lister.operators(removed) == narrow.operators({})


def test_left_out_blocks_have_no_operators(resnet: Analysed) -> None:
    _, coupling, _, lister = resnet
    inside = [node for node in calls(coupling.graph) if any(path == "stages.1.2" for path, _ in module_stack(node))]
    reduced = analysed(resnet20(width=32, stem_stride=2, blocks=(3, 2, 3)))[3]
    assert lister.operators({}, {node.name for node in inside}) == reduced.operators({})
    last = next(node for node in reversed(inside))  # an activation whose addition is gone runs on its own
    alone = lister.operators({}, {node.name for node in inside} - {last.name})
    assert kinds(alone) - kinds(reduced.operators({})) == {"unary": 1}


@pytest.mark.slow
def test_an_addition_stays_merged_when_the_block_before_it_is_left_out() -> None:
    _, coupling, _, lister = analysed(mobilenet(blocks=(1, 3, 1, 1)))
    additions = [node for node in calls(coupling.graph) if node.name.startswith("add")]
    before = next(addition for addition in additions if any(user.args[0] is addition for user in additions))
    block = module_stack(before)[-1][0]
    inside = {node.name for node in calls(coupling.graph) if any(path == block for path, _ in module_stack(node))}
    assert kinds(lister.operators({})) - kinds(lister.operators({}, inside)) == {"conv": 3}
    assert kinds(lister.operators({}, inside))["binary"] == 0


class Many(nn.Module):
    """Uses one of each kind of operator that the built-in models do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.up = nn.Conv1d(1, 8, 3, padding="same"), nn.ConvTranspose2d(8, 4, 2, 2)
        self.pool, self.average, self.norm = nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.BatchNorm2d(4)
        self.words = nn.Embedding(10, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.line(x.flatten(2)).unflatten(2, (28, 28))
        y = torch.sigmoid(self.average(self.pool(nn.functional.silu(self.norm(nn.functional.relu6(self.up(y)))))))
        y = (y @ y.transpose(2, 3)).softmax(-1) * 2 - y.amax((2, 3), keepdim=True)
        y = y + self.words((x[:, 0, 0, :4] > 0).long()).mean((1, 2))[:, None, None, None]
        return torch.cumsum(y, 1).reshape(y.shape[0], -1)


def test_every_kind_of_operator_can_be_built_and_timed(device: DeviceProfile) -> None:
    _, _, _, lister = analysed(Many())
    operators = lister.operators({})
    attention = make("attention", ((1, 2, 8, 4),) * 3, 64, masked=True)
    every = [*operators, attention, make("layer_norm", ((8, 16),), 128)]
    assert set(kinds(every)) == {
        *("conv", "conv_transpose", "pool", "batch_norm", "unary", "binary", "matmul", "softmax", "reduce"),
        *("transpose", "view", "gather", "attention", "layer_norm"),
    }
    progress = Notices()
    timed = OperatorTable(device, progress=progress)
    timed.measure(every)
    assert progress.notices == []
    assert progress.steps == [("measuring operators", len({operator.key for operator in every}))]
    assert set(timed.known) == {OVERHEAD, *(operator.key for operator in every)}
    assert all(0 <= seconds < 0.1 for seconds in timed.known.values())
    assert timed.known[next(operator for operator in operators if operator.kind == "conv_transpose").key] > 0


def test_copies_of_a_convolution_run_in_blocks_and_change_layout_once(device: DeviceProfile, tmp_path: Path) -> None:
    operator = make(
        "conv",
        ((1, 32, 14, 14), (32, 32, 3, 3)),
        32 * 14 * 14,
        stride=(1, 1),
        padding=(1, 1, 1, 1),
        dilation=(1, 1),
        groups=1,
    )
    data = build(operator, 4, form=device.int8).SerializeToString()
    assert data == build(operator, 4, form=device.int8).SerializeToString()
    assert len(data) < 5000  # weights are made as the file is loaded
    optimized = optimized_operators(onnx.load_from_string(data), tmp_path / "optimized.onnx")
    assert optimized["Conv"] == 4
    assert optimized["ConstantOfShape"] == optimized["Add"] == 0
    assert optimized["ReorderInput"] <= 1


@pytest.mark.parametrize("per_channel", [True, False])
def test_int8_operators_run_on_integer_kernels(
    resnet: Analysed, device: DeviceProfile, tmp_path: Path, per_channel: bool
) -> None:
    form = device.int8.model_copy(update={"activations": "uint8", "per_channel": per_channel})
    lister = OperatorLister(resnet[2], "int8")
    one_of_each = {operator.kind: operator for operator in lister.operators({}) if operator.int8}
    expected = {"conv": "QLinearConv", "binary": "QLinearAdd", "linear": "QGemm"}
    assert set(one_of_each) == set(expected)
    for kind, operator in one_of_each.items():
        for copies in (1, 4):
            model = build(operator, copies, form=form, most=4)
            found = optimized_operators(model, tmp_path / "optimized.onnx")
            assert found[expected[kind]] == copies
            assert found["Conv"] == found["Add"] == found["Gemm"] == found["ConstantOfShape"] == 0
            assert kind != "conv" or found["QLinearAdd"] == 3, "as many additions however many copies"
    product = in_int8(make("linear", ((8, 16), (32, 16)), 256, gemm=False, bias=True))
    found = optimized_operators(build(product, 4, form=form), tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] == found["Add"] == 4


def test_int8_nets_have_additions_and_no_activations_beside_convolutions(resnet: Analysed) -> None:
    _, _, counter, _ = resnet
    lister = OperatorLister(counter, "int8")
    assert kinds(lister.operators({})) == {"conv": 21, "binary": 9, "reduce": 1, "view": 1, "linear": 1}
    assert Tally(operator.int8 for operator in lister.operators({})) == {True: 31, False: 2}
    as_transformer = OperatorLister(counter, "int8", int8_form(policy="transformer")).operators({})
    assert not any(operator.int8 for operator in as_transformer if operator.kind == "binary")
    without_convolutions = OperatorLister(counter, "int8", int8_form(left_float=("conv2d",))).operators({})
    assert [operator.kind for operator in without_convolutions if operator.int8] == ["linear"]
    assert without_convolutions[:-1] == OperatorLister(counter).operators({})[:-1]


def test_int8_transformers_keep_what_lies_between_linear_layers_float(transformer: Analysed) -> None:
    _, _, counter, lister = transformer
    operators = OperatorLister(counter, "int8").operators({})
    assert {operator.kind for operator in operators if operator.int8} == {"conv", "linear"}
    assert [operator.kind for operator in operators] == [operator.kind for operator in lister.operators({})]


def test_more_work_takes_longer_and_nothing_is_measured_twice(device: DeviceProfile) -> None:
    progress = Notices()
    timed = OperatorTable(device, progress=progress)
    small, large = unary(1_000, "Gelu"), unary(100_000, "Gelu")
    assert timed.seconds([large]) > 5 * timed.seconds([small])
    assert timed.seconds([small, large]) == pytest.approx(
        timed.known[OVERHEAD] + timed.known[small.key] + timed.known[large.key]
    )
    assert timed.seconds([]) == timed.known[OVERHEAD] > 0
    assert len(progress.steps) == 2


def test_an_operator_that_the_runtime_refuses_is_approximated(device: DeviceProfile) -> None:
    progress = Notices()
    timed = OperatorTable(device, progress=progress)
    strange, plain = unary(50_000, "NoSuchFunction"), unary(50_000, "Gelu")
    timed.measure([strange, plain])
    assert timed.known[strange.key] == timed.known[approximation(50_000).key] > 0
    assert len(progress.notices) == 1
    assert "NoSuchFunction" in progress.notices[0]
    timed.seconds([strange, plain])
    assert len(progress.notices) == 1


def test_an_operator_that_ends_the_process_is_found(device: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def job(kind: str, files: Sequence[Path], **_: Any) -> Any:
        runs.append(len(files) // 2)
        if any(b"Gelu" in file.read_bytes() for file in files):
            raise MeasureError("the measuring process was killed by SIGSEGV")
        return {"overhead": 1e-6, "seconds": [float(len(runs))] * (len(files) // 2)}

    monkeypatch.setattr(table, "run_job", job)
    progress = Notices()
    timed = OperatorTable(device, progress=progress)
    operators = [unary(size, "Tanh") for size in range(1, 8)]
    timed.measure([*operators, unary(9, "Gelu")])
    assert {OVERHEAD, unary(9, "Gelu").key, approximation(9).key, *(one.key for one in operators)} == set(timed.known)
    assert len(progress.notices) == 1
    assert len(runs) < 16


def test_a_runtime_that_does_not_run_is_an_error(device: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(kind: str, files: Sequence[Path], **_: Any) -> Any:
        raise MeasureError("there is no onnxruntime")

    monkeypatch.setattr(table, "run_job", job)
    with pytest.raises(MeasureError, match="no onnxruntime"):
        OperatorTable(device).measure([unary(size, "Tanh") for size in range(1, 100)])


def test_a_table_comes_back_from_json(device: DeviceProfile) -> None:
    timed = OperatorTable(device, {unary(9, "Tanh").key: 2e-6, unary(10, "Tanh").key: 3e-6, OVERHEAD: 1e-6})
    text = json.dumps(timed.to_json())
    again = OperatorTable.from_json(json.loads(text), device)
    assert json.dumps(again.to_json()) == text
    assert again.seconds([unary(9, "Tanh"), unary(9, "Tanh")]) == pytest.approx(5e-6)
    assert list(again.known) == sorted(again.known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "another version"),
        ({"seconds": {"a": -1.0}}, "damaged"),
        ({"seconds": {"a": "fast"}}, "damaged"),
        ({"seconds": [1.0]}, "damaged"),
        ({"device": None}, "not measured on the device"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(device: DeviceProfile, change: dict[str, Any], message: str) -> None:
    document = {**OperatorTable(device, {OVERHEAD: 1e-6}).to_json(), **change}
    with pytest.raises(MeasureError, match=message):
        OperatorTable.from_json(document, device)


def test_a_table_of_another_thread_count_is_refused(device: DeviceProfile) -> None:
    document = OperatorTable(device, {OVERHEAD: 1e-6}).to_json()
    with pytest.raises(MeasureError, match="not measured on the device"):
        OperatorTable.from_json(document, device.model_copy(update={"threads": device.threads + 1}))
    OperatorTable.from_json(document, device.model_copy(update={"price_per_hour": 3.0}))


def test_a_thousand_candidates_take_seconds(resnet: Analysed, device: DeviceProfile) -> None:
    _, coupling, counter, lister = resnet
    generator = random.Random(0)
    candidates = [widths(coupling, generator, 0.1, 1.0) for _ in range(200)]
    known = {operator.key: 1e-6 for removed in candidates for operator in lister.operators(removed)}
    timed = OperatorTable(device, {**known, OVERHEAD: 1e-6})
    started = time.thread_time()
    for removed in candidates:
        counter.macs(removed)
        timed.seconds(lister.operators(removed))
    assert time.thread_time() - started < 2  # measured: 0.2


def quantized(model: Model, device: DeviceProfile) -> Model:
    images = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    split = TensorSplit((images, torch.zeros(64, dtype=torch.int64)))
    around = Surroundings(
        seed=0,
        task=Classification(),
        data=Data(name="noise", train=split, val=split, test=split),
        device=device,
        trainer=TrainerConfig(),
        goals={},
        stages={},
        load_source=lambda source: pytest.fail("no source is needed"),
        source_fingerprint=str,
    )
    return quantize(model, StaticConfig(), Context(name="quantize", surroundings=around, progress=SilentProgress()))


def prediction(
    net: Analysed, device: DeviceProfile, folder: Path, shares: Sequence[float], rounds: int, precision: Any = "float"
) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and real seconds of cuts that keep these shares of the channels."""
    model, coupling, counter, _ = net
    lister = OperatorLister(counter, precision)
    generator = random.Random(0)
    cuts = [widths(coupling, generator, share, min(1.0, share + 0.1)) for share in shares]
    timed = OperatorTable(device)
    timed.measure([operator for removed in cuts for operator in lister.operators(removed)])
    predicted = np.array([timed.seconds(lister.operators(removed)) for removed in cuts])
    files = []
    for removed in cuts:
        narrow = cut(model, coupling, removed)
        shipped = quantized(narrow, device) if precision == "int8" else narrow
        files.append(export_onnx(shipped, folder / f"{len(files)}.onnx").path)
    feeds = {model.spec.inputs[0].name: np.zeros((1, 1, 28, 28), np.float32)}
    settings = {"rounds": rounds, "sessions": 2}
    sessions = run_job("latency", files, device=device, feeds=feeds, settings=settings)
    clock = 1 if device.threads == 1 else 0
    real = [
        np.concatenate([np.ravel(np.array(session[at])[..., clock]) for session in sessions]) for at in range(len(cuts))
    ]
    return predicted, np.array([np.median(times) for times in real])


@pytest.mark.slow
def test_the_sum_predicts_the_latency_of_cut_resnets(resnet: Analysed, device: DeviceProfile, tmp_path: Path) -> None:
    predicted, real = prediction(resnet, device, tmp_path, (1.0, 0.5, 0.2), rounds=20)
    assert list(np.argsort(predicted)) == list(np.argsort(real))
    assert predicted / real == pytest.approx(np.ones(3), abs=0.35)  # measured: within 0.14


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_the_sum_ranks_cuts_as_the_runtime_does(
    name: str, precision: str, device: DeviceProfile, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shares = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    predicted, real = prediction(request.getfixturevalue(name), device, tmp_path, shares, 30, precision)
    assert kendalltau(predicted, real).statistic >= 0.8  # measured: 0.93 to 1.0
    assert predicted / real == pytest.approx(np.ones(len(shares)), abs=0.35)  # measured: within 0.19


@pytest.mark.parametrize(
    ("activation", "channels"),
    [
        *(("hardswish", 32), ("tanh", 30)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("hardsigmoid", 30), ("sigmoid", 32))),
    ],
)
def test_activations_that_floats_have_for_free_are_calls_of_their_own_between_integers(
    activation: str, channels: int, tmp_path: Path
) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, channels, 3), nn.Conv2d(channels, channels, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(getattr(nn.functional, activation)(self.first(x)))
            return result

    model, _, counter, _ = analysed(Between())
    kinds = {
        precision: [one.kind for one in OperatorLister(counter, precision, int8_form(policy="cnn")).operators({})]
        for precision in ("float", "int8")
    }
    assert kinds == {"float": ["conv", "conv"], "int8": ["conv", "unary", "conv"]}
    file = export_onnx(model, tmp_path / "model.onnx").path
    found = optimized_operators(onnx.load(file), tmp_path / "optimized.onnx")
    assert set(found) <= {"Conv", "FusedConv", "ReorderInput", "ReorderOutput"}
