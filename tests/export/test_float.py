from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import ExportError, OutputError
from mil_cli.export import exporter
from mil_cli.export.coverage import integer_coverage
from mil_cli.export.onnx import export_onnx
from mil_cli.export.parity import check_parity
from mil_cli.export.session import OnnxModel, feeds_of
from mil_cli.graph.model import Model

Build = Callable[[str], Any]


def unpack(made: Any) -> tuple[Any, Any, Any, Any]:
    return made.module, made.inputs, made.model, made.exported


NAMES = ["resnet", "mobilenet", pytest.param("vit", marks=pytest.mark.slow), "encoder"]


@pytest.mark.parametrize("name", NAMES)
def test_float_file_is_the_users_module(name: str, case: Build) -> None:
    module, inputs, model, exported = unpack(case(name))
    runner = OnnxModel(exported.path, model.spec)
    for batch in (1, 7):
        args = inputs(batch)
        with torch.no_grad():
            expected = module(*args)
        found = runner(*args)
        for reference, value in zip(model.flatten_outputs(expected), model.flatten_outputs(found), strict=True):
            assert value.dtype == reference.dtype
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-4)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    parity = check_parity(model, exported.path, [(inputs(batch), {}) for batch in (1, 7)])
    assert parity.samples == 8
    assert parity.max_abs_diff < 1e-4
    assert not parity.quantized
    assert parity.problem() is None


@pytest.mark.parametrize("name", NAMES)
def test_interface_is_the_specification(name: str, case: Build) -> None:
    model, exported = case(name).model, case(name).exported
    proto = onnx.load(exported.path)
    assert [value.name for value in proto.graph.input] == [tensor.name for tensor in model.spec.inputs]
    assert [value.name for value in proto.graph.output] == [tensor.name for tensor in model.spec.outputs]
    values = [*proto.graph.input, *proto.graph.output]
    for value, tensor in zip(values, [*model.spec.inputs, *model.spec.outputs], strict=True):
        dimensions = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dimensions == [tensor.dynamic.get(axis, size) for axis, size in enumerate(tensor.shape)]
        assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == np.dtype(tensor.dtype)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": exported.opset}


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_nothing_of_its_making_is_in_the_file(name: str, case: Build) -> None:
    module, exported = case(name).module, case(name).exported
    data = exported.path.read_bytes()
    folder = str(exported.path.parent).encode()
    for leak in (b".py", b"site-packages", b"/torch/", folder, b"forward", b"nn_module", b"s77"):
        assert leak not in data, leak
    assert not re.search(rb"(/[A-Za-z0-9_.-]+){3,}", b"".join(re.findall(rb"[\x20-\x7e]{6,}", data)))
    proto = onnx.load_from_string(data)
    assert not proto.metadata_props
    assert not proto.graph.value_info
    assert all(not node.doc_string and not node.metadata_props for node in proto.graph.node)
    weights = sum(parameter.numel() * 4 for parameter in module.parameters())
    assert len(data) < weights + 20_000


def test_the_same_model_gives_the_same_bytes_quietly(
    case: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mobilenet = case("mobilenet")
    monkeypatch.setattr(exporter, "_make_registry", lambda **_: pytest.fail("the registry is made a second time"))
    model = Model.capture(mobilenet.module, mobilenet.inputs(2))
    capfd.readouterr()
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert capfd.readouterr() == ("", "")
    assert path.read_bytes() == mobilenet.exported.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name != "mil-cache"] == ["model.onnx"]


class Odd(nn.Module):
    """Passes an input on, gives one tensor twice, a constant, and names an output like an inner value."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor, *, unused: Tensor, scale: float = 2.0) -> dict[str, Any]:
        y = torch.relu(self.relu(x)) * scale
        return {"same": x, "relu": y, "again": y, "table": self.table, "nested": (y + 1,)}


def test_odd_outputs_and_inputs_keep_their_names(tmp_path: Path) -> None:
    module = Odd().eval()
    args, kwargs = (torch.randn(3, 4),), {"unused": torch.randn(3, 2), "scale": 2.0}
    model = Model.capture(module, args, kwargs)
    runner = OnnxModel(export_onnx(model, tmp_path / "model.onnx").path, model.spec)
    args, kwargs = (torch.randn(6, 4),), {"unused": torch.randn(6, 2), "scale": 2.0}
    expected, found = module(*args, **kwargs), runner(*args, **kwargs)
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)


def test_replaces_the_baseline_in_a_plain_script(case: Build) -> None:
    encoder = case("encoder")
    model, inputs, path = encoder.model, encoder.inputs, encoder.exported.path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens, mask = inputs(4)
    logits, states = session.run(["logits", "states"], {"tokens": tokens.numpy(), "mask": mask.numpy()})
    assert logits.shape == (4, 3)
    assert states.shape == (4, 7, 32)
    assert set(feeds_of(model.spec, (tokens, mask), {})) == {"tokens", "mask"}


def test_errors_name_the_file_and_the_next_step(case: Build, tmp_path: Path) -> None:
    model, path = case("mobilenet").model, case("mobilenet").exported.path
    with pytest.raises(ExportError, match="there is no file"):
        OnnxModel(tmp_path / "missing.onnx", model.spec)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ExportError, match="cannot load"):
        OnnxModel(broken, model.spec)
    with pytest.raises(ExportError, match="other inputs"):
        OnnxModel(path, case("encoder").model.spec)
    with pytest.raises(ExportError, match="at least one thread"):
        OnnxModel(path, model.spec, threads=0)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    small = Model.capture(nn.Linear(2, 2).eval(), (torch.randn(2, 2),))
    with pytest.raises(OutputError, match="cannot write"):
        export_onnx(small, blocked / "model.onnx")


def test_parity_finds_a_file_of_other_weights(case: Build) -> None:
    mobilenet = case("mobilenet")
    model, inputs, path = mobilenet.model, mobilenet.inputs, mobilenet.exported.path
    changed = model.clone()
    with torch.no_grad():
        dict(changed.named_parameters())["head.bias"][0] += 0.01
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        check_parity(changed, path, [(inputs(4), {})])
    loose = check_parity(changed, path, [(inputs(4), {})], strict=False)
    assert loose.max_abs_diff == pytest.approx(0.01, rel=1e-3)
    assert loose.differing_fraction == pytest.approx(0.1)
    with pytest.raises(ExportError, match="at least one batch"):
        check_parity(model, path, [])


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_operator_without_translation_is_named(tmp_path: Path) -> None:
    model = Model.capture(Unknown().eval(), (torch.rand(2, 3),))
    with pytest.raises(ExportError, match=r"cannot be written as ONNX: .*bessel_j0"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))
    assert not list(tmp_path.glob(".writing-*"))


def test_float_file_has_no_integer_kernel(case: Build) -> None:
    coverage = integer_coverage(case("mobilenet").exported.path)
    assert coverage.integer_layers == 0
    assert len(coverage.float_layers) == 5
    assert coverage.conversions == 0


class BiasedAttention(nn.Module):
    """Attention with a bias: torch's exporter lays its result out in another order than the fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).view(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.bias + x.mean((1, 2)).view(-1, 1, 1, 1)  # one for each sample
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return mixed.transpose(1, 2).reshape(x.shape[0], 6, -1)


def test_attention_with_a_bias_can_be_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model.capture(BiasedAttention().eval(), (torch.randn(2, 6, 8),))
    path = tmp_path / "attention.onnx"
    export_onnx(model, path)
    assert check_parity(model, path, [((torch.randn(3, 6, 8),), {})]).max_abs_diff < 1e-5
    assert "Identity" not in {node.op_type for node in onnx.load(path).graph.node}  # the copy costs nothing


class ShapedAttention(nn.Module):
    """Attention of queries, keys and values of any number of axes; inputs are (batch, 4, 6, 8)."""

    def __init__(self, axes: int, mask_axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.project = nn.Linear(8, 24)
        shape = (1, 4, 2, 6, 6)[-mask_axes:] if mask_axes else ()
        self.mask = nn.Parameter(torch.randn(shape)) if mask_axes else None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).view(x.shape[0], 4, 6, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)  # batch, 4, heads, 6, size
        parts = parts.flatten(1, 3) if self.axes == 3 else parts
        mixed = nn.functional.scaled_dot_product_attention(*parts.unbind(0), attn_mask=self.mask)
        return mixed.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("axes", "mask_axes"),
    [(5, 4), *(pytest.param(*axes, marks=pytest.mark.slow) for axes in ((5, 0), (5, 2), (5, 5), (3, 0), (3, 2)))],
)
def test_attention_may_have_any_number_of_axes(axes: int, mask_axes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model.capture(ShapedAttention(axes, mask_axes).eval(), (torch.randn(2, 4, 6, 8),))
    path = tmp_path / "attention.onnx"
    export_onnx(model, path)
    assert check_parity(model, path, [((torch.randn(3, 4, 6, 8),), {})]).max_abs_diff < 1e-5
