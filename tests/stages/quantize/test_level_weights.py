"""PACT, DoReFa and APoT: their levels by brute force, what is computed of weights, and files on integer kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mil_cli.data.base import Data
from mil_cli.errors import ExportError
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_attribute
from mil_cli.stages.quantize import aware
from mil_cli.stages.quantize.apot import ApotConfig, additive_levels, whole_levels
from mil_cli.stages.quantize.describe import present_bits
from mil_cli.stages.quantize.dorefa import DorefaConfig
from mil_cli.stages.quantize.pact import PactConfig, decay_clips
from mil_cli.stages.quantize.ranges import CodeRange, weight_codes
from mil_cli.stages.quantize.settle import settle
from mil_cli.stages.quantize.squashed import levels_of
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.quantize.static import quantize as quantize_static
from mil_cli.stages.registry import StageConfig, config_type, function_of
from tests.stages.quantize.striped import accuracy, context, images, loss, small_mlp, small_resnet, small_vit

METHODS: list[type[StageConfig]] = [PactConfig, DorefaConfig, ApotConfig]


def run(kind: type[StageConfig], model: Model, data: Data, **settings: Any) -> Model:
    config = kind(**{"weight_bits": 3, "activation_bits": 3, "batch_norm_samples": 256, **settings})
    assert config_type("quantize", kind.method) is kind
    return function_of(config)(model, config, context(data))


def weights_of(model: Model) -> dict[str, tuple[Any, torch.Tensor]]:
    """By name of a weight its quantizer, and the levels that it takes, in units of its scale."""
    found = {}
    for node in calls(model.graph):
        if op_name(node) in ("quantize_levels", "quantize_affine") and node.args[0].op == "get_attr":
            weight, scale = (get_attribute(model.graph, str(source.target)).detach() for source in node.args[:2])
            by_row = [-1, *[1] * (weight.ndim - 1)] if scale.ndim else []
            rest = [get_attribute(model.graph, str(arg.target)) if hasattr(arg, "target") else arg for arg in node.args]
            found[str(node.args[0].target)] = (node, node.target(*rest).detach() / scale.reshape(by_row))
    return found


def enumerated(bits: int) -> set[Fraction]:
    """All sums of the paper's sets (equation 5 with k = 2; the left-over bit as its authors' code has it)."""
    n, left = divmod(bits - 1, 2)
    sets = [[0, *(Fraction(1, 2**e) for e in (i, i + n, i + 2 * n + left))] for i in range(1, n + 1)]
    sets += [[0, Fraction(1, 2 ** (2 * n + 1))]] if left else []
    sums = {Fraction(sum(choice)) for choice in itertools.product(*sets)}
    return {sign * total / max(sums) for total in sums for sign in (1, -1)}


@pytest.mark.parametrize("bits", range(2, 9))
def test_additive_levels_are_all_sums_of_the_papers_sets(bits: int) -> None:
    levels = additive_levels(bits)
    assert {Fraction(int(level), int(levels[-1])) for level in levels} == enumerated(bits)
    assert len(levels) == 2**bits - 1
    assert torch.equal(levels, levels.sort().values)
    assert float(levels[levels > 0].min()) == 1


AUTHORS: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((4, 2, 1),),
    3: ((8, 4, 1), (2,)),
    4: ((32, 8, 2), (16, 4, 1)),
    5: ((64, 16, 2), (32, 8, 1), (4,)),
    6: ((256, 32, 4), (128, 16, 2), (64, 8, 1)),
}
"""Of so many bits of magnitude the terms of `build_power_value` in the authors' code, in units of the smallest."""


@pytest.mark.parametrize("bits", AUTHORS)
def test_additive_levels_of_the_authors(bits: int) -> None:
    sums = sorted({sum(terms) for terms in itertools.product(*((0, *each) for each in AUTHORS[bits]))})
    levels = additive_levels(bits + 1)
    assert levels[levels >= 0].tolist() == sums


def test_additive_levels_by_hand() -> None:
    assert additive_levels(2).tolist() == [-1, 0, 1]
    assert additive_levels(4)[7:].tolist() == [0, 1, 2, 3, 4, 6, 8, 10]
    assert torch.equal(whole_levels(6, largest=127), additive_levels(6))


def test_dorefa_levels_are_those_of_the_paper() -> None:
    for bits in range(2, 8):
        levels = levels_of(weight_codes(bits, reduce_range=False), largest=127)
        grid = torch.arange(2**bits) / (2**bits - 1)
        torch.testing.assert_close(levels / levels[-1], 2 * grid - 1)
    assert levels_of(weight_codes(8, reduce_range=True), largest=64).tolist() == list(range(-64, 65))
    # The kernels of a reduced range would saturate at 127.
    assert levels_of(weight_codes(7, reduce_range=True), largest=64).tolist() == list(range(-63, 64))
    assert levels_of(CodeRange(-2, 1), largest=127).tolist() == [-3, -1, 1, 3]


def test_dorefa_weights_are_those_of_the_paper_times_a_constant(
    model: Model, data: Data, inserted: dict[str, Model]
) -> None:
    result = run(DorefaConfig, model, data, per_channel=False, trainer={"epochs": 1})
    trained, start = inserted["trained"], inserted["start"]
    weight = dict(trained.named_parameters())["body.0.weight"].detach()
    bounded = weight.tanh() / (2 * weight.tanh().abs().max()) + 0.5
    expected = 2 * (bounded * 7).round() / 7 - 1
    _, found = weights_of(result)["body.0.weight"]
    torch.testing.assert_close(found / 7, expected)
    # Least squares: no other constant brings the rounded weights nearer to those that came in.
    before = dict(start.named_parameters())["body.0.weight"].detach()
    unit = before.tanh() / before.tanh().abs().max()
    unit = 2 * ((unit / 2 + 0.5) * 7).round() / 7 - 1
    size = float(get_attribute(start.graph, "quantizers.body_0_weight.scale")) * 7
    errors = [float((before - unit * size * share).square().sum()) for share in (0.99, 1.0, 1.01)]
    assert errors[1] == min(errors)


def test_apot_normalises_weights(model: Model, data: Data, inserted: dict[str, Model]) -> None:
    result = run(ApotConfig, model, data, per_channel=False, weight_bits=4, trainer={"epochs": 1})
    before, after = (dict(inserted[name].named_parameters())["body.0.weight"] for name in ("start", "trained"))
    normal = (after - after.mean()) / after.std(correction=0) * before.std(correction=0)
    torch.testing.assert_close(dict(result.named_parameters())["body.0.weight"], normal, check_stride=False)
    _, found = weights_of(result)["body.0.weight"]
    assert sorted(weight for weight, _ in present_bits(result).bits.values()) == [4, 8, 8]
    assert {round(float(value), 3) for value in found.unique()} <= {float(level) for level in additive_levels(4)}


@pytest.mark.parametrize("kind", METHODS)
def test_settling_and_folding_change_no_output(
    kind: type[StageConfig], model: Model, data: Data, inserted: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aware, "settle_biases", lambda graph: None)  # which rounds them, and so changes outputs
    result = run(kind, model, data, batch_norm="freeze", trainer={"epochs": 1})
    trained = inserted["trained"]
    with torch.no_grad():
        before = trained(images(data.val))
        settle(trained.graph)
        assert torch.equal(trained(images(data.val)), before)
        found = result(images(data.val))
    assert ((before - found).abs() < 1e-4).float().mean() > 0.95
    assert not any(op_name(node) == "batch_norm" for node in calls(result.graph))
    assert {name for name, _ in result.named_parameters()} == {
        name for name, _ in quantize_static(model, StaticConfig(), context(data)).named_parameters()
    }
    assert not any(name.endswith(".size") for name in result.state_dict())


@pytest.mark.parametrize("kind", METHODS)
def test_it_learns_what_rounding_alone_loses(kind: type[StageConfig], model: Model, data: Data) -> None:
    low = {"weight_bits": 2, "activation_bits": 2}
    result = run(kind, model, data, **low, trainer={"epochs": 4})
    rounded = quantize_static(model, StaticConfig(**low), context(data))
    assert loss(result, data) < 0.8 * loss(rounded, data)
    assert accuracy(result, data) > accuracy(model, data) - 0.1


@pytest.mark.parametrize(
    ("build", "kind", "bits", "opset"),
    [
        (small_mlp, ApotConfig, 4, 21),
        pytest.param(small_vit, ApotConfig, 4, 21, marks=pytest.mark.slow),
        pytest.param(small_resnet, PactConfig, 2, 25, marks=pytest.mark.slow),
        pytest.param(small_resnet, ApotConfig, 4, 21, marks=pytest.mark.slow),
        pytest.param(small_resnet, ApotConfig, 2, 25, marks=pytest.mark.slow),
        pytest.param(small_vit, DorefaConfig, 2, 25, marks=pytest.mark.slow),
    ],
)
def test_the_file_computes_the_same_on_integer_kernels(
    build: Callable[[], nn.Module], kind: type[StageConfig], bits: int, opset: int, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Model.capture(build().eval(), (torch.randn(2, 1, 8, 8),))
    result = run(kind, net, data, weight_bits=bits, activation_bits=4, trainer={"epochs": 1})
    exported = export_onnx(result, tmp_path / "model.onnx")
    coverage = integer_coverage(exported.path)
    assert coverage.float_layers == ()
    assert coverage.integer_layers == len(weights_of(result))
    assert exported.opset == opset
    check_parity(result, exported.path, [((images(data.val),), {})])
    result.save(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(Model.load(tmp_path / "model.pt2")(images(data.val)), result(images(data.val)))


def test_levels_that_are_too_fine_are_rounded(model: Model, data: Data, tmp_path: Path) -> None:
    for largest in (64, 127):
        levels = whole_levels(8, largest=largest)
        assert torch.equal(levels, -levels.flip(0))
        assert levels[-1] == largest
        shares = additive_levels(8) / additive_levels(8)[-1]
        distances = (shares[:, None] * largest - levels).abs()
        assert float(distances.amin(1).max()) <= 0.5  # each level of the paper has one
        assert float(distances.amin(0).max()) <= 0.5  # and there are no others
    settings = {"weight_bits": 8, "activation_bits": 8, "first_last_bits": 2, "reduce_range": True}
    result = run(ApotConfig, model, data, **settings, trainer={"epochs": 1})
    exported = export_onnx(result, tmp_path / "model.onnx")
    assert integer_coverage(exported.path).integer_layers == len(weights_of(result)) == 3
    check_parity(result, exported.path, [((images(data.val),), {})])


@pytest.mark.parametrize("inner", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_edges_are_even_where_they_have_more_bits_than_the_inner_layers(inner: int, model: Model, data: Data) -> None:
    """As `mixed` asks for it: the bits of each layer by name, beside a `weight_bits` of 8."""
    layers = {"body.*": {"weight_bits": inner}}
    result = run(ApotConfig, model, data, weight_bits=8, layers=layers, trainer={"epochs": 1})
    edges = {name: node for name, (node, _) in weights_of(result).items() if not name.startswith("body")}
    assert len(edges) == 2
    assert all(op_name(node) == "quantize_affine" for node in edges.values())
    assert sorted(bits for bits, _ in present_bits(result).bits.values()) == [inner, 8, 8]


def test_levels_that_no_integer_holds_are_refused(model: Model, data: Data, tmp_path: Path) -> None:
    result = run(ApotConfig, model, data, weight_bits=4, trainer={"epochs": 1}).clone()
    set_attribute(result.graph, "quantizers.body_0_weight.levels", additive_levels(4) / 10)
    with pytest.raises(ExportError, match="no whole numbers"):
        export_onnx(result, tmp_path / "model.onnx")


def test_clips_decay_as_the_paper_has_it(model: Model, data: Data, inserted: dict[str, Model]) -> None:
    run(PactConfig, model, data, trainer={"epochs": 1})
    training = inserted["start"]
    scales = [value for name, value in training.named_parameters() if name.startswith("quantizers")]
    for value in training.parameters():
        value.grad = torch.ones_like(value)
    decay_clips(0.25)(training, 0, 10)
    assert len(scales) >= 3
    for value in scales:
        torch.testing.assert_close(value.grad, 1 + 0.25 * value.detach())
    others = [value for name, value in training.named_parameters() if not name.startswith("quantizers")]
    assert all(bool((value.grad == 1).all()) for value in others)  # type: ignore[union-attr]


def test_a_weight_that_others_read_stays_theirs(data: Data) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.shared(x.flatten(1)))
            x = torch.relu(self.shared(x)) + (x @ self.shared.weight.tanh())
            logits: torch.Tensor = self.head(x)
            return logits

    torch.manual_seed(0)
    net = Model.capture(Tied().eval(), (torch.randn(2, 1, 8, 8),))
    result = run(DorefaConfig, net, data, weight_bits=4, trainer={"epochs": 1})
    parameters = dict(result.named_parameters())
    squashed, kept = parameters["shared.weight_rounded"], parameters["shared.weight"]
    assert not torch.equal(squashed, kept)
    assert {str(node.args[0].target) for node, _ in weights_of(result).values()} >= {"shared.weight_rounded"}
    tanh = next(node for node in calls(result.graph) if op_name(node) == "tanh")
    assert tanh.args[0].target == "shared.weight"
    # The layer is used as a first one, of 8 bits, and as an inner one: its weight is rounded once for both.
    assert [name for name in parameters if name.startswith("shared.weight_")] == ["shared.weight_rounded"]
    assert {bits for bits, _ in present_bits(result).bits.values()} == {8}


class Stored(nn.Module):
    """The weight of a layer is a buffer: it does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16, 64))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(nn.functional.linear(x.flatten(1), self.table)))
        return logits


@pytest.mark.parametrize("kind", [DorefaConfig, ApotConfig])
def test_a_weight_that_is_a_buffer_is_put_on_levels_and_stays(kind: type[StageConfig], data: Data) -> None:
    torch.manual_seed(0)
    model = Model.capture(Stored().eval(), (torch.randn(2, 1, 8, 8),))
    result = run(kind, model, data, first_last_bits=3, trainer={"epochs": 1}, damping=1e-3)
    stored = get_attribute(result.graph, "table")
    assert not stored.requires_grad
    _, levels = weights_of(result)["table"]
    assert levels.round().unique().numel() <= 8
    assert float(torch.corrcoef(torch.stack([stored.flatten(), model.state_dict()["table"].flatten()]))[0, 1]) > 0.9


class Averaging(nn.Module):
    """A filter that averages, and a weight of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 4, 3)
        self.blur = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        nn.init.constant_(self.blur.weight, 1 / 9)
        self.gain = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.blur(torch.relu(self.mix(self.gain(x))))).mean((2, 3)))
        return logits


def test_apot_leaves_a_mean_where_it_is_most_of_a_weight(data: Data, inserted: dict[str, Model]) -> None:
    torch.manual_seed(0)
    model = Model.capture(Averaging().eval(), (torch.randn(2, 1, 8, 8),))
    run(ApotConfig, model, data, weight_bits=6, activation_bits=8, trainer={"epochs": 1})
    settle(inserted["start"].graph)
    found = weights_of(inserted["start"])
    for name in ("blur.weight", "gain.weight"):
        node, _ = found[name]
        arguments = [get_attribute(inserted["start"].graph, str(source.target)) for source in node.args[:3]]
        rounded = node.target(*arguments, *node.args[3:])
        torch.testing.assert_close(rounded, model.state_dict()[name], rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("kind", "bits", "factor"),
    [
        (DorefaConfig, 2, 16),
        pytest.param(ApotConfig, 2, 64, marks=pytest.mark.slow),
        pytest.param(ApotConfig, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_biases_beside_levels_are_rounded_to_steps_of_the_multiplied_ones(
    kind: type[StageConfig], bits: int, factor: int, model: Model, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, Tensor] = {}
    original = aware.settle_biases

    def settled(graph: GraphModule) -> None:
        before.update({name: value.detach().clone() for name, value in graph.named_parameters() if "bias" in name})
        original(graph)

    monkeypatch.setattr(aware, "settle_biases", settled)
    result = run(kind, model, data, weight_bits=bits, activation_bits=2, trainer={"epochs": 1})
    (layer,) = (
        node for node in calls(result.graph) if op_name(node) == "conv2d" and str(node.args[2].target) == "body.0.bias"
    )
    scales = [get_attribute(result.graph, str(get_argument(node, "scale").target)) for node in layer.args[:2]]
    step = scales[0].double() * scales[1].double() / factor
    after, start = (each["body.0.bias"].detach().double() for each in (dict(result.named_parameters()), before))
    assert ((after - start).abs() <= 0.51 * step).all()
    assert ((after / step) - (after / step).round()).abs().max() < 1e-3
