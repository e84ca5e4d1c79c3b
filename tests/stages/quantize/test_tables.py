"""Tables of embeddings: which bits they get, that a tied one is in the file once, and that they learn."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import open_session, session_options
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.adaround import AdaroundConfig
from mil_cli.stages.quantize.apot import ApotConfig
from mil_cli.stages.quantize.brecq import BrecqConfig
from mil_cli.stages.quantize.describe import planned_bits, present_bits
from mil_cli.stages.quantize.dorefa import DorefaConfig
from mil_cli.stages.quantize.dynamic import DynamicConfig
from mil_cli.stages.quantize.gptq import GptqConfig
from mil_cli.stages.quantize.lsq import LsqConfig
from mil_cli.stages.quantize.mixed import MixedConfig
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.weight_only import WeightOnlyConfig
from mil_cli.stages.quantize.weights import weight_scale
from mil_cli.stages.registry import StageConfig, function_of
from tests.stages.contexts import make_context

WORDS, WIDTH, LENGTH = 997, 48, 5
USED = 200
"""Words below this are in the data."""

_GRAPH_BYTES = 4000
"""What the file holds beside weights, their scales and biases: its nodes."""


class Language(nn.Module):
    """Predicts the next word by the table that it looks words up in."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Embedding(LENGTH, WIDTH)
        self.register_buffer("positions", torch.arange(LENGTH))
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(self.positions)
        logits: Tensor = self.head(torch.tanh(self.mix(x)))
        return logits


class Pooled(Language):
    """The same with one prediction for a text, which the exporter writes with the table as it is."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.words(tokens) + self.places(self.positions))).mean(1))
        return logits


def texts(count: int) -> Tensor:
    return torch.randint(0, USED, (count, LENGTH), generator=torch.Generator().manual_seed(count))


def data() -> Data:
    split = TensorSplit((texts(64), texts(64)[:, 0]))
    return Data(name="words", train=split, val=split, test=split)


@cache
def captured(kind: type[Language], **settings: bool) -> Model:
    torch.manual_seed(0)
    return Model.capture(kind(**settings).eval(), (texts(2),))


def capture(kind: type[Language] = Language, **settings: bool) -> Model:
    """Return a copy of the captured network."""
    return captured(kind, **settings).clone()


def run(config: StageConfig, model: Model, **stages: StageConfig) -> tuple[Model, Context]:
    used = make_context(data(), original=model, stages=stages)
    return function_of(config)(model, config, used), used


def quantizers(model: Model) -> dict[str, Any]:
    """Return the quantizer of each reader of a weight, by the reader's name."""
    return {
        user.name: node
        for node in calls(model.graph)
        if op_name(node).startswith("quantize_") and get_argument(node, "x").op == "get_attr"
        for user in node.users
    }


@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        (8, Language),
        (4, Pooled),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((4, Language), (8, Pooled))),
    ],
)
def test_a_tied_table_is_in_the_file_once(bits: int, kind: type[Language], tmp_path: Path) -> None:
    net = capture(kind)
    model, used = run(StaticConfig(weight_bits=bits, first_last_bits=bits, bias_correction=False), net)
    assert (used.notes["quantized_layers"], used.notes["quantized_tables"]) == (2, 2)
    path = export_onnx(model, tmp_path / "model.onnx").path
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    rows = sum(len(weight) for weight in weights)
    promised = sum(weight.numel() for weight in weights) * bits / 8 + 5 * rows  # a scale and a zero point for each row
    assert promised < path.stat().st_size < 1.05 * promised + _GRAPH_BYTES
    parity = check_parity(model, path, [((texts(7),), {})])
    assert parity.relative_rms < 1e-3
    assert integer_coverage(path).integer_layers == 2
    assert integer_coverage(path).float_layers == ()
    options = session_options(threads=1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    open_session(path, threads=1, options=options)
    tables = [tensor for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer if WORDS in tensor.dims]
    assert {tensor.data_type for tensor in tables if WIDTH in tensor.dims} == {onnx.TensorProto.INT8}


def test_rows_have_scales_and_the_bits_of_weights() -> None:
    net = capture(tied=False)
    plain, used = run(StaticConfig(weight_bits=3, per_channel=False, activation_bits=4), net)
    found = quantizers(plain)
    assert [get_argument(found[name], "axis") for name in ("embedding", "embedding_1", "linear")] == [0, 0, None]
    assert get_argument(found["embedding"], "quant_max") == 3
    plan = planned_bits(net, Rules.of(StaticConfig(weight_bits=3, activation_bits=4), used))
    assert plan.bits == present_bits(plain).bits
    assert plan.bits["embedding"] == (3, None)
    # Nothing multiplies a table's codes: they need no reduced range.
    found = quantizers(run(StaticConfig(reduce_range=True), net)[0])
    assert [get_argument(found[name], "quant_max") for name in ("embedding", "linear")] == [127, 64]


def test_a_shared_table_has_the_bits_that_any_of_its_readers_asks_for() -> None:
    net = capture()
    for settings, largest in (
        ({"weight_bits": 4}, 127),  # the head is a last layer
        ({"weight_bits": 4, "first_last_bits": 4}, 7),
        ({"weight_bits": 2, "first_last_bits": 2, "layers": {"words": {"weight_bits": 3}}}, 3),
    ):
        model, _ = run(StaticConfig.model_validate({"reduce_range": False, **settings}), net)
        found = quantizers(model)
        assert {get_argument(found[name], "quant_max") for name in ("embedding", "linear_1")} == {largest}
        assert len({get_argument(found[name], "scale").target for name in ("embedding", "linear_1")}) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"embeddings": False}, "embeddings: false"),
        ({"skip": ["words"]}, "skipped by 'words'"),
        ({"skip": ["head"]}, "linear reads its weight too"),
    ],
)
def test_a_table_that_stays_float_somewhere_does_so_everywhere(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model, used = run(StaticConfig(**settings), capture())
    kept: Any = used.notes["kept_float"]
    assert kept["words"] == reason
    assert kept["head"] in ("embedding reads its weight too", "skipped by 'head'")
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert path.stat().st_size < 1.05 * 4 * capture().num_params() + _GRAPH_BYTES


def test_a_table_that_is_read_along_two_axes_stays_float() -> None:
    class Soft(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.mix(torch.softmax(super().forward(tokens), 2) @ self.words.weight)

    _, used = run(StaticConfig(), capture(Soft))
    kept: Any = used.notes["kept_float"]
    assert {kept[name] for name in ("words", "head")} == {
        "its weight is read along two axes, which need scales of their own"
    }


@pytest.mark.parametrize("config", [GptqConfig, AdaroundConfig, BrecqConfig])
def test_tables_are_rounded_to_nearest_which_serves_their_rows_best(config: Any) -> None:
    """No other weight could make up for a row's errors, so that the least error of each number is the least of all."""
    settings = {"weight_bits": 3, "iterations": 3} if config is not GptqConfig else {"weight_bits": 3}
    net = capture(tied=False)
    model, _ = run(config(**settings), net)
    node = quantizers(model)["embedding"]
    stored, exact = model.state_dict()["words.weight"], net.state_dict()["words.weight"]
    assert torch.equal(stored, exact)
    step = model.state_dict()[str(get_argument(node, "scale").target)][:, None]
    with torch.no_grad():
        found = model.graph.get_parameter("words.weight").div(step).round().clamp(-4, 3) * step
    inside = (exact / step > -4) & (exact / step < 3)
    assert bool(((found - exact).abs() <= step / 2 + 1e-6)[inside].all())


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", [LsqConfig, DorefaConfig, pytest.param(ApotConfig, marks=pytest.mark.slow)])
def test_rows_that_are_used_learn_and_others_stay(kind: Any, tied: bool, tmp_path: Path) -> None:
    net = capture(Pooled, tied=tied)
    trainer = {"epochs": 2, "learning_rate": 0.5, "optimizer": {"weight_decay": 0.0}}
    config = kind(weight_bits=4, first_last_bits=4, trainer=trainer, calibration_samples=64)
    model, _ = run(config, net)
    before, after = (each.state_dict()["words.weight"] for each in (net, model))
    moved = (before != after).any(1)
    assert bool(moved[texts(64).unique()[1:]].all())
    if not tied:
        assert not bool(moved[USED:].any())
        assert not bool(moved[0])  # padding
        codes = CodeRange(-8 if kind is LsqConfig else -7, 7)
        start = weight_scale(before, axis=0, codes=codes, observer="mse")
        scale = model.state_dict()[str(get_argument(quantizers(model)["embedding"], "scale").target)]
        assert torch.equal(scale[USED:], start[USED:])
        assert bool((scale != start)[1:USED].any()) == (kind is not DorefaConfig)
    assert model.num_params() == net.num_params()
    path = export_onnx(model, tmp_path / "model.onnx").path
    check_parity(model, path, [((texts(9),), {})])


@pytest.mark.parametrize("thaw", [True, False])
def test_frozen_weights_learn_only_where_they_are_thawed(thaw: bool) -> None:
    net = capture(Pooled, tied=False)
    net.graph.get_parameter("words.weight").requires_grad_(False)
    config = LsqConfig(weight_bits=4, thaw=thaw, trainer={"epochs": 1, "learning_rate": 0.5}, calibration_samples=64)
    model, _ = run(config, net)
    after = model.graph.get_parameter("words.weight")
    assert torch.equal(after, net.graph.get_parameter("words.weight")) != thaw
    assert not after.requires_grad
    assert model.graph.get_parameter("mix.weight").requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_tables_beside_products_with_ranges_found_at_run_time(tied: bool, tmp_path: Path) -> None:
    net = capture(tied=tied)
    model, used = run(DynamicConfig(weight_bits=4, first_last_bits=4), net)
    assert (used.notes["quantized_layers"], used.notes["quantized_tables"]) == (2, 2)
    path = export_onnx(model, tmp_path / "model.onnx").path
    check_parity(model, path, [((texts(7),), {})])
    assert integer_coverage(path).integer_layers == 2
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    promised = sum(weight.numel() / 2 + 4 * len(weight) for weight in weights)
    assert promised < path.stat().st_size < 1.05 * promised + _GRAPH_BYTES


def test_mixed_counts_a_tied_table_once() -> None:
    net = capture(Pooled)
    narrow = StaticConfig(first_last_bits=2, bias_correction=False)
    model, used = run(MixedConfig(by="narrow", average_bits=5, samples=32), net, narrow=narrow)
    found: Any = used.notes["sensitivities"]
    assert sorted(entry["name"] for entry in found) == ["mix", "places", "words"]
    bits = {name: weight for name, (weight, _) in present_bits(model).bits.items()}
    assert bits["embedding"] == bits["linear_1"]
    sizes = {"embedding": WORDS * WIDTH, "embedding_1": LENGTH * WIDTH, "linear": WIDTH * WIDTH}
    mean = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(used.notes["average_bits"])
    assert mean <= 5


def test_weights_alone_give_what_static_gives_a_table() -> None:
    net = capture(tied=False)
    whole, _ = run(WeightOnlyConfig(weight_bits=4, block_size=None), net)
    static, _ = run(StaticConfig(weight_bits=4), net)
    rounded = [
        torch.nn.functional.embedding(torch.arange(WORDS), _rounded(model, "embedding")) for model in (whole, static)
    ]
    torch.testing.assert_close(rounded[0], rounded[1])


def _rounded(model: Model, reader: str) -> Tensor:
    node = quantizers(model)[reader]
    values = [
        model.state_dict()[str(argument.target)] if isinstance(argument, torch.fx.Node) else argument
        for argument in node.args
    ]
    result: Tensor = node.target(*values)
    return result
