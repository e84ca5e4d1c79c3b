"""Weights in few bits: which, in which blocks, how many bytes, and that the file computes what the graph does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.device.host import resolve
from mil_cli.errors import StageError
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import open_session, session_options
from mil_cli.graph.coupling import analyse
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.quantize.weight_only import WeightOnlyConfig, quantize
from mil_cli.stages.registry import check_order, config_type, function_of
from tests.stages.contexts import make_context, trained_digits

_GRAPH_BYTES, _WEIGHT_BYTES = 3000, 600
"""What the file holds beside weights and biases: the nodes of the float model, and those that read out one weight."""


class Mixed(nn.Module):
    """Every kind of weight that is rounded, some used twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(401, 96)
        self.conv, self.norm = nn.Conv1d(96, 72, 3, padding=1), nn.BatchNorm1d(72)
        self.up = nn.ConvTranspose1d(72, 96, 2, 2, groups=2)
        self.lstm = nn.LSTM(96, 8, batch_first=True)
        self.wide, self.twice = nn.Linear(96, 250), nn.Linear(250, 250)
        self.mix = nn.Parameter(torch.randn(250, 96) * 0.1)
        self.head = nn.Linear(96, 401)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.norm(self.conv(self.embedding(x).transpose(1, 2))))
        y = self.up(y).transpose(1, 2)
        mixed = self.twice(self.twice(torch.relu(self.wide(y)))) @ self.mix
        return self.head(mixed), self.lstm(y)[0]


def tokens(count: int) -> tuple[Tensor]:
    return (torch.randint(0, 401, (count, 6), generator=torch.Generator().manual_seed(count)),)


@pytest.fixture(scope="module")
def mixed() -> Model:
    torch.manual_seed(0)
    return Model.capture(Mixed().eval(), tokens(2))


def rounded(model: Model, **settings: Any) -> tuple[Model, dict[str, object]]:
    used = make_context(digits())
    return quantize(model, WeightOnlyConfig(**{"weight_observer": "min_max", **settings}), used), used.notes


@pytest.mark.parametrize(
    ("bits", "block_size"),
    [(2, 64), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, None), (4, 32), (3, 128)))],
)
def test_the_file_takes_the_bits_that_were_promised(
    bits: int, block_size: int | None, mixed: Model, tmp_path: Path
) -> None:
    model, notes = rounded(mixed, weight_bits=bits, first_last_bits=bits, block_size=block_size)
    assert set(notes["kept_float"]) == {"lstm.lstm"}  # type: ignore[call-overload]
    assert notes["quantized_weights"] == 6
    exported = export_onnx(model, tmp_path / "model.onnx")
    weights = {name: parameter for name, parameter in mixed.named_parameters() if parameter.ndim > 1}
    sizes = [parameter.numel() for name, parameter in weights.items() if "lstm" not in name]
    promised = sum(sizes) * float(notes["bits_per_weight"]) / 8  # type: ignore[arg-type]
    assert bits <= float(notes["bits_per_weight"]) < 1.15 * bits  # type: ignore[arg-type]
    others = sum(parameter.numel() * 4 for parameter in mixed.graph.parameters()) - 4 * sum(sizes)
    over = exported.path.stat().st_size - others - promised
    assert 0 < over < 0.05 * promised + _GRAPH_BYTES + 6 * _WEIGHT_BYTES
    parity = check_parity(model, exported.path, [(tokens(5), {})])
    assert parity.relative_rms < 1e-5
    assert any(f"stored in {bits} bits" in notice for notice in exported.notices)


@pytest.mark.slow
def test_nothing_is_read_out_at_every_inference(mixed: Model, tmp_path: Path) -> None:
    """onnxruntime's own graph has the float model's operators."""
    operators = []
    for name, model in (("float", mixed), ("rounded", rounded(mixed, weight_bits=3, first_last_bits=4)[0])):
        path, optimized = export_onnx(model, tmp_path / f"{name}.onnx").path, tmp_path / "optimized.onnx"
        options = session_options(threads=1)
        options.optimized_model_filepath = str(optimized)
        open_session(path, threads=1, options=options)
        operators.append(sorted(node.op_type for node in onnx.load(optimized).graph.node))
    assert operators[0] == operators[1]


def test_each_block_has_the_scale_that_it_needs() -> None:
    net = Model.capture(nn.Linear(100, 4).eval(), (torch.randn(2, 100),))
    weight = net.state_dict()["weight"]
    with torch.no_grad():
        weight[:, 64:] *= 20
    errors = []
    for size in (64, None):
        model, _ = rounded(net, block_size=size, first_last_bits=2)
        with torch.no_grad():
            errors.append((model(torch.eye(100)) - model.state_dict()["bias"]).T - weight)
        if size:
            scale = model.graph.get_buffer("quantizers.weight_weight.scale")
            assert scale.shape == (4, 2)
            assert torch.equal(scale, scale.bfloat16().float())  # 16 bits hold it in the file
            assert bool((errors[0].abs() <= 0.53 * scale.repeat_interleave(64, 1)[:, :100]).all())
    assert float(errors[0][:, :64].square().mean()) < 0.02 * float(errors[1][:, :64].square().mean())


def test_what_reads_a_weight_too_keeps_it_float() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.first.weight.abs().sum()

    net = Model.capture(Penalised().eval(), (torch.randn(2, 8),))
    model, notes = rounded(net, skip=())
    assert notes["kept_float"] == {"first": "abs reads its weight too"}
    quantizers = [node for node in calls(model.graph) if op_name(node) == "quantize_blocks"]
    assert [str(get_argument(node, "x").target) for node in quantizers] == ["second.weight"]
    with pytest.raises(StageError, match="no weight of the model can be rounded"):
        rounded(net, skip=("second",))


def test_embeddings_may_stay_float_and_have_bits_of_their_own(mixed: Model) -> None:
    _, notes = rounded(mixed, embeddings=False)
    kept: Any = notes["kept_float"]
    assert "embedding reads its weight too" in kept.values()  # the last layer's, which is the same
    assert notes["quantized_weights"] == 5
    module = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    net = Model.capture(module, (torch.zeros(2, 3, dtype=torch.int64),))
    model, _ = rounded(net, weight_bits=2, first_last_bits=8)
    found = [node for node in calls(model.graph) if op_name(node) == "quantize_blocks"]
    assert [get_argument(node, "quant_max") for node in found] == [1, 1, 127]
    _, notes = rounded(net, embeddings=False)
    assert notes["kept_float"] == {"0": "embeddings: false"}


@pytest.mark.parametrize(
    ("bits", "block_size", "dims"),
    [
        (4, 32, 96),
        (4, 64, 100),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((3, None, 96), (8, 32, 96))),
    ],
)
def test_tables_are_looked_up_in_integers(bits: Any, block_size: Any, dims: int, tmp_path: Path) -> None:
    """Floats of the whole table would take more memory than the float model; but for blocks that do not fill a row."""
    net = Model.capture(nn.Sequential(nn.Embedding(401, dims), nn.Linear(dims, 8)).eval(), tokens(2))
    model, _ = rounded(net, weight_bits=bits, block_size=block_size)
    path, optimized = export_onnx(model, tmp_path / "model.onnx").path, tmp_path / "optimized.onnx"
    check_parity(model, path, [(tokens(count), {}) for count in (1, 5)])
    options = session_options(threads=1)
    options.optimized_model_filepath = str(optimized)
    open_session(path, threads=1, options=options)
    table = max(onnx.load(optimized).graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    assert math.prod(table.dims) == 401 * dims
    assert table.data_type == (onnx.TensorProto.FLOAT if dims == 100 else onnx.TensorProto.INT8)


class Rows(nn.Module):
    """A large product of one row for each sample, one of several, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.row, self.small = nn.Linear(1024, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.row(torch.relu(self.tokens(x)).mean(1)))


@pytest.mark.parametrize("bits", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_large_products_of_one_row_read_codes(bits: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Model.capture(Rows().eval(), (torch.randn(2, 3, 1024),))
    model, notes = rounded(net, weight_bits=bits, first_last_bits=bits)
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer == ({"MatMulNBits": 1} if bits == 4 else {})
    parity = check_parity(model, path, [((torch.randn(count, 3, 1024),), {}) for count in (1, 9)])
    assert parity.relative_rms < (0.02 if bits == 4 else 1e-5)  # the kernel rounds activations to 8 bits
    numbers = sum(parameter.numel() for parameter in net.graph.parameters() if parameter.ndim > 1)
    promised = numbers * float(notes["bits_per_weight"]) / 8  # type: ignore[arg-type]
    assert promised < path.stat().st_size < 1.05 * promised


def test_a_target_without_that_kernel_gets_plain_operators(tmp_path: Path) -> None:
    net = Model.capture(nn.Linear(1024, 1024).eval(), (torch.randn(2, 1024),))
    model, _ = rounded(net, weight_bits=4, first_last_bits=4, weight_observer="min_max")
    device = resolve({"name": "host_cpu", "provider": "CUDAExecutionProvider"}, runnable=False)
    path = export_onnx(model, tmp_path / "model.onnx", device=device).path
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    parity = check_parity(model, path, [((torch.randn(3, 1024),), {})])
    assert parity.relative_rms < 1e-5


@pytest.mark.slow
def test_gptq_keeps_outputs_better_than_nearest() -> None:
    net = trained_digits()
    images = next(iter(digits().val.batches(200)))[0]
    errors = []
    for rounding in ("nearest", "gptq"):
        config = {"weight_bits": 3, "first_last_bits": 3, "rounding": rounding, "calibration_samples": 128}
        model, notes = rounded(net, weight_observer="mse", **config)
        with torch.no_grad():
            errors.append(float((model(images) - net(images)).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    ratios: Any = notes["error_to_nearest"]
    assert len(ratios) == notes["quantized_weights"]


def test_a_rounded_model_is_quantized_and_can_be_archived_and_analysed(tmp_path: Path) -> None:
    net = trained_digits()
    model, _ = rounded(net, block_size=None)
    for again, config in ((quantize, WeightOnlyConfig()), (quantize_static, StaticConfig())):
        with pytest.raises(StageError, match="quantized already"):
            again(model, config, make_context(digits()))  # type: ignore[operator]
    model.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    images = next(iter(digits().val.batches(8)))[0]
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.num_params() == fold_batch_norm(net).num_params()
    assert analyse(model).unknown == ()
    assert set(present_bits(model).bits.values()) == {(4, None), (8, None)}


def test_registered_and_bounded() -> None:
    assert config_type("quantize", "weight_only") is WeightOnlyConfig
    assert function_of(WeightOnlyConfig()) is quantize
    assert len(check_order([("a", WeightOnlyConfig()), ("b", StaticConfig())])) == 1
    for wrong in ({"weight_bits": 5}, {"block_size": 16}, {"damping": 0}, {"rounding": "up"}):
        with pytest.raises(ValidationError):
            WeightOnlyConfig(**wrong)  # type: ignore[arg-type]
