from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.errors import ExportError
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.packing import storage_bits, widening
from mil_cli.export.parity import Parity, check_parity, without_quantizers
from mil_cli.export.session import OnnxModel
from mil_cli.export.surgery import GraphWriter
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_attribute

Build = Callable[[str], Any]
KERNELS = {
    "resnet": {"QLinearConv": 4, "QGemm": 1},
    "mobilenet": {"QLinearConv": 4, "QGemm": 1},
    "vit": {"QLinearConv": 1, "MatMulIntegerToFloat": 4, "QGemm": 1},
    "encoder": {"MatMulIntegerToFloat": 3, "QGemm": 2},
}


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_layer_runs_on_an_integer_kernel(name: str, case: Build, tmp_path: Path) -> None:
    made = case(name)
    model, notes = made.quantize()
    exported = export_onnx(model, tmp_path / "model.onnx")
    coverage = integer_coverage(exported.path)
    assert coverage.integer == dict(sorted(KERNELS[name].items()))
    assert coverage.integer_layers == notes["quantized_layers"]
    assert coverage.float_layers == ()
    if name in ("resnet", "mobilenet"):
        assert coverage.other_integer == {"QLinearAdd": 1}
    parity = check_parity(model, exported.path, [(made.inputs(count), {}) for count in (1, 7, 32)])
    assert parity.quantized
    assert parity.samples == 40
    assert parity.noise_ratio is not None
    assert parity.noise_ratio < 1.5
    proto = onnx.load(exported.path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    values = [*proto.graph.input, *proto.graph.output]
    baseline = onnx.load(made.exported.path).graph
    assert values == [*baseline.input, *baseline.output]


@pytest.mark.parametrize("wider", [1.0, 1.4])
def test_a_clip_before_few_bits_is_one_of_codes_and_layers_stay_integer(
    wider: float, case: Build, tmp_path: Path
) -> None:
    """onnxruntime itself leaves out a clip of floats only where it cuts nothing off what 8 bits can hold."""
    made = case("mobilenet")
    model, notes = made.quantize(weight_bits=4, activation_bits=4)
    clipped = [
        node
        for node in calls(model.graph)
        if op_name(node) == "quantize_affine" and op_name(get_argument(node, "x")) in ("relu6", "hardtanh")
    ]
    assert clipped
    for node in clipped:  # ranges may have been learned beyond what the clip lets through
        name = str(get_argument(node, "scale").target)
        set_attribute(model.graph, name, wider * get_attribute(model.graph, name))
    path = export_onnx(model, tmp_path / "model.onnx").path
    coverage = integer_coverage(path)
    assert coverage.float_layers == ()
    assert coverage.integer_layers == notes["quantized_layers"]
    assert all(
        node.op_type != "Clip" or node.input[0].startswith("QuantizeLinear") for node in onnx.load(path).graph.node
    )
    inputs = made.inputs(32)
    parity = check_parity(model, path, [(inputs, {})])
    assert parity.noise_ratio is not None
    assert parity.noise_ratio < 1.5


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of all initializers by ONNX type."""
    sizes: dict[str, int] = {}
    for tensor in onnx.load(path).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        sizes[kind] = sizes.get(kind, 0) + len(tensor.raw_data)
    return sizes


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(3, "UINT8"), (2, "INT2"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, "INT8"), (4, "INT4")))],
)
def test_weights_are_packed(bits: int, kind: str, case: Build, tmp_path: Path) -> None:
    made = case("mobilenet")
    model, _ = made.quantize(weight_bits=bits, first_last_bits=bits)
    exported = export_onnx(model, tmp_path / "model.onnx")
    numbers = sum(parameter.numel() for parameter in made.module.parameters() if parameter.dim() > 1)
    sizes = weight_bytes(exported.path)
    assert numbers * bits / 8 <= sizes[kind] <= numbers * bits / 8 + 500  # beside 8-bit zero points
    assert sizes["FLOAT"] < 3000  # scales and biases
    assert integer_coverage(exported.path).integer == KERNELS["mobilenet"]
    check_parity(model, exported.path, [(made.inputs(16), {})])
    assert exported.opset == (25 if bits == 2 else 21)
    assert exported.notices == ()


def test_packed_codes_are_those_of_the_graph(case: Build, tmp_path: Path) -> None:
    made = case("vit")
    model, _ = made.quantize(weight_bits=4)
    path = export_onnx(model, tmp_path / "model.onnx").path
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    codes = constants["block.up.transposed.codes"].astype(np.float32)
    scale = constants["block.up.scale"]
    quantizers = model.graph.get_submodule("quantizers.block_up_weight")
    weight = dict(model.named_parameters())["block.up.weight"]
    expected = (weight / quantizers.scale[:, None]).round().clamp(-8, 7)
    assert np.array_equal(codes.T, expected.detach().numpy())
    assert (codes.min(), codes.max()) == (-8, 7)
    assert np.array_equal(
        8 * scale, quantizers.scale.numpy()
    )  # kernels see codes times 8, so that biases have finer steps


def test_target_without_packed_types_gets_bytes(case: Build, tmp_path: Path) -> None:
    model, _ = case("mobilenet").quantize(weight_bits=4)
    device = DeviceProfile(name="old", int8=Int8Form(activations="uint8", reduce_range=False), weight_bits=(8,))
    exported = export_onnx(model, tmp_path / "model.onnx", device=device)
    assert "INT4" not in weight_bytes(exported.path)
    assert exported.notices == (
        "3 weights: 16 levels stored in 8 bits each, the narrowest form of the target that holds them",
    )
    check_parity(model, exported.path, [(case("mobilenet").inputs(16), {})])


def test_target_without_three_bits_gets_four(case: Build, tmp_path: Path) -> None:
    model, _ = case("mobilenet").quantize(weight_bits=3)
    device = DeviceProfile(name="old", int8=Int8Form(activations="uint8", reduce_range=False), weight_bits=(2, 4, 8))
    exported = export_onnx(model, tmp_path / "model.onnx", device=device)
    assert exported.notices == (
        "3 weights: 8 levels stored in 4 bits each, the narrowest form of the target that holds them",
    )


@pytest.mark.parametrize(
    ("activations", "per_channel"),
    [
        *(("uint8", False), ("int8", True)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("uint8", True), ("int8", False))),
    ],
)
def test_signs_and_granularity(activations: str, per_channel: bool, case: Build, tmp_path: Path) -> None:
    made = case("mobilenet")
    model, _ = made.quantize({"activations": activations, "per_channel": per_channel, "reduce_range": True})
    path = export_onnx(model, tmp_path / "model.onnx").path
    proto = onnx.load(path)
    codes = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.data_type == 3]
    assert max(int(np.abs(array.astype(int)).max()) for array in codes if array.ndim > 1) == 64
    if activations == "uint8":  # onnxruntime rewrites signed activations on x86, and loses some on the way
        assert integer_coverage(path).integer == KERNELS["mobilenet"]
    check_parity(model, path, [(made.inputs(16), {})])


def test_narrow_activations_are_clipped_between_integer_kernels(case: Build, tmp_path: Path) -> None:
    made = case("resnet")
    model, _ = made.quantize(activation_bits=4, weight_bits=4)
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer == KERNELS["resnet"]
    parity = check_parity(model, path, [(made.inputs(64), {})])
    assert parity.noise_ratio is not None
    assert parity.noise_ratio < 1


class Recurrent(nn.Module):
    """What has no integer kernel beside what has, a weight used twice, and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 16) * 0.2)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.up = nn.ConvTranspose1d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm((x @ self.mix).relu())[0]
        return self.up((self.shared(y) + self.shared(y.tanh())).transpose(1, 2))


def test_what_stays_float_is_said(tmp_path: Path, make_case: Callable[..., Any]) -> None:
    made = make_case(Recurrent(), lambda count: (torch.randn(count, 5, 8),), tmp_path / "float.onnx")
    model, notes = made.quantize()
    assert set(notes["kept_float"]) == {"lstm.lstm", "up"}
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer == {"MatMulIntegerToFloat": 3}
    check_parity(model, path, [(made.inputs(3), {})])


def test_large_bias_beside_tiny_weights_does_not_overflow(tmp_path: Path, make_case: Callable[..., Any]) -> None:
    """Integer kernels hold biases as int32 in steps of both scales: unguarded, this one would saturate."""
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        module[0].weight[3] *= 1e-12
        module[0].bias[3] = 2.0
        module[3].weight[1] *= 1e-12
        module[3].bias[1] = -5.0
        module[0].weight[4] = 0.0
        module[0].bias[4] = 1.0
    made = make_case(module.eval(), lambda count: (torch.randn(count, 1, 3, 3),), tmp_path / "float.onnx")
    model, _ = made.quantize()
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer_layers == 2
    args = made.inputs(32)
    found = OnnxModel(path, model.spec)(*args)
    with torch.no_grad():
        torch.testing.assert_close(found, module(*args), atol=0.05, rtol=0)
    check_parity(model, path, [(args, {})])


def test_parity_finds_wrong_codes(case: Build, tmp_path: Path) -> None:
    """As a kernel that saturates would: the file's products come out clipped."""
    made = case("resnet")
    model, _ = made.quantize()
    path = export_onnx(model, tmp_path / "model.onnx").path
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            codes = onnx.numpy_helper.to_array(tensor)
            tensor.raw_data = codes.clip(-100, 100).tobytes()
    onnx.save(proto, path)
    with pytest.raises(ExportError, match="rounding noise"):
        check_parity(model, path, [(made.inputs(32), {})])


def test_without_quantizers_is_the_float_model(case: Build) -> None:
    made = case("resnet")
    model, _ = made.quantize()
    plain = without_quantizers(model)
    assert plain is not None
    assert without_quantizers(plain) is None
    args = made.inputs(4)
    with torch.no_grad():  # biases are whole steps of the integer kernels
        torch.testing.assert_close(plain(*args), made.module(*args), atol=1e-4, rtol=1e-3)


def test_quantizers_that_onnx_cannot_hold_are_refused(make_case: Callable[..., Any], tmp_path: Path) -> None:
    made = make_case(nn.Sequential(nn.Linear(8, 4)), lambda count: (torch.randn(count, 8),), tmp_path / "float.onnx")
    model, _ = made.quantize()
    broken = model.clone()
    set_attribute(broken.graph, "quantizers.input_1.scale", torch.tensor(0.0))
    with pytest.raises(ExportError, match="not positive"):
        export_onnx(broken, tmp_path / "model.onnx")
    broken = model.clone()
    with torch.no_grad():
        dict(broken.named_parameters())["0.weight"][0, 0] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        export_onnx(broken, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.glob("*.onnx")] == ["float.onnx"]


def test_codes_of_few_bits_are_multiplied_as_far_as_seven_bits_hold_them() -> None:
    ranges = ((-127, 127), (-64, 64), (-32, 31), (-16, 15), (-8, 7), (-4, 3), (-2, 1), (-1, 1))
    assert [widening(low, high) for low, high in ranges] == [1, 1, 2, 4, 8, 16, 32, 64]


def test_storage_bits() -> None:
    ranges = ((-127, 127), (-8, 7), (-3, 3), (-4, 3), (-2, 1), (-1, 1))
    assert [storage_bits(low, high) for low, high in ranges] == [8, 4, 3, 3, 2, 2]
    assert storage_bits(-1, 1, (4, 8)) == 4
    assert storage_bits(-1, 1, ()) == 8
    with pytest.raises(ExportError, match="8 bits"):
        storage_bits(-200, 200)


@pytest.mark.slow
def test_quantized_model_survives_its_archive(case: Build, tmp_path: Path) -> None:
    made = case("mobilenet")
    model, _ = made.quantize()
    model.save(tmp_path / "model.pt2")
    loaded = Model.load(tmp_path / "model.pt2")
    args = made.inputs(5)
    with torch.no_grad():
        assert torch.equal(loaded(*args), model(*args))
    first = export_onnx(model, tmp_path / "first.onnx").path
    second = export_onnx(loaded, tmp_path / "second.onnx").path
    assert first.read_bytes() == second.read_bytes()


class Queries(nn.Module):
    """Adds positions and reads queries, both learned: activations that are the same for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.position, self.queries = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 8))
        self.query, self.head = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.first(x) + self.position.view(1, -1, 1, 1))
        return self.head(x.mean((2, 3))), self.query(self.queries.unsqueeze(0))


@pytest.mark.parametrize(("activations", "bits"), [("uint8", 8), ("uint8", 4), ("int8", 8)])
def test_learned_activations_are_written_as_codes(
    activations: str, bits: int, tmp_path: Path, make_case: Callable[..., Any]
) -> None:
    made = make_case(Queries(), lambda count: (torch.randn(count, 1, 8, 8),), tmp_path / "float.onnx")
    model, notes = made.quantize({"activations": activations}, activation_bits=bits, first_last_bits=bits)
    assert notes["quantized_layers"] == 4
    path = export_onnx(model, tmp_path / "model.onnx").path
    stored = {tuple(each.dims): each.data_type for each in onnx.load(path).graph.initializer}
    assert stored[1, 8, 1, 1] == (onnx.TensorProto.UINT8 if activations == "uint8" else onnx.TensorProto.INT8)
    args = made.inputs(8)
    check_parity(model, path, [(args, {})])
    # Optimised, onnxruntime rounds what the product of a constant reads once more (MatMulNBits on integers).
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = session.run(None, {"x": args[0].numpy()})[1]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(given), model(*args)[1])


def test_a_clip_without_an_upper_bound_and_values_that_were_cast(tmp_path: Path, make_case: Callable[..., Any]) -> None:
    """A cast is a node ``to``, which is also what every module has."""

    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.float()).clamp(0.0, float("inf"))).mean((2, 3))

    def bytes_of(count: int) -> tuple[Tensor, ...]:
        return (torch.randint(0, 9, (count, 1, 8, 8), dtype=torch.uint8),)

    made = make_case(Clipped(), bytes_of, tmp_path / "float.onnx")
    model, _ = made.quantize()
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert integer_coverage(path).integer == {"QLinearConv": 2}
    check_parity(model, path, [(made.inputs(8), {})])


def test_constants_get_names_that_no_value_has() -> None:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([2]))
    node = ir.node("Shape", [x])
    node.outputs[0].name = "shape"
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 21})
    writer = GraphWriter(graph)
    names = [writer.constant(name, np.array([1]), ir.DataType.INT64).name for name in ("shape", "x")]
    names.append(writer.constant("x", np.array([2]), ir.DataType.INT64).name)
    assert not {"x", "shape"} & {*names}
    assert len({*names}) == 2


@pytest.mark.parametrize(("difference", "noise", "fine"), [(0.009, None, True), (0.011, None, False), (0.1, 1.9, True)])
def test_a_file_may_not_differ_where_the_model_rounds_nothing(
    difference: float, noise: float | None, fine: bool
) -> None:
    """Weights that are on their codes already leave no noise to compare with."""
    parity = Parity(difference, 1, 1.0, difference, 1.0, quantized=True, noise_ratio=noise)
    assert (parity.problem() is None) == fine
