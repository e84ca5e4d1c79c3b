"""Packed codes against what onnxruntime reads out of them, for every width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.export.packing import (
    ALL_WIDTHS,
    Multiplied,
    index_bits,
    pack_three_bits,
    widening,
    write_codes,
    write_levels,
)
from mil_cli.export.surgery import GraphWriter
from mil_cli.measure.memory import measure_memory

Write = Callable[[GraphWriter, ir.Node], ir.Value]


def read_back(write: Write, shape: tuple[int, ...], dtype: ir.DataType) -> tuple[np.ndarray, int]:
    """Return what onnxruntime makes of a weight that was written, and the bytes of the initializer that holds it."""
    y = ir.val("y", dtype=dtype, shape=ir.Shape(shape))
    end = ir.node("Identity", [ir.val("x")], outputs=[y])
    graph = ir.Graph([], [y], nodes=[end], name="packed", opset_imports={"": 25})
    end.replace_input_with(0, write(GraphWriter(graph), end))
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    (held,) = (tensor for tensor in proto.graph.initializer if tensor.name in ("weight", "weight.codes"))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0]), len(held.raw_data)


def drawn(bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    return codes.astype(np.int32)


def packed_bytes(bits: int, count: int) -> int:
    return 3 * -(-count // 8) if bits == 3 else -(-count * bits // 8)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (4, 2, 3, 3), (1,)])
def test_codes_come_back(bits: int, shape: tuple[int, ...]) -> None:
    codes = drawn(bits, shape)
    for dtype in (ir.DataType.INT8, ir.DataType.FLOAT):
        found, size = read_back(partial(write_codes, name="weight", codes=codes, bits=bits, dtype=dtype), shape, dtype)
        assert found.dtype == dtype.numpy()
        assert np.array_equal(found, codes)
        assert size == packed_bytes(bits, codes.size)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(3, 7), (4, 2, 3, 3)])
def test_codes_come_back_multiplied(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.maximum(drawn(bits, shape), 1 - 2 ** (bits - 1))  # as weights have them: as many below 0 as above
    factor = widening(int(codes.min()), int(codes.max()))

    def write(onnx: GraphWriter, end: ir.Node) -> ir.Value:
        return Multiplied(onnx).write(end, "weight", codes, bits, factor)

    found, size = read_back(write, shape, ir.DataType.INT8)
    assert np.array_equal(found, factor * codes)
    assert size == packed_bytes(bits, codes.size)


@pytest.mark.parametrize("count", [3, 4, 7, 16, 255])
def test_levels_come_back(count: int) -> None:
    levels = np.sort(np.random.default_rng(0).choice(np.arange(-127, 128), count, replace=False))
    codes = np.random.default_rng(1).integers(0, count, (5, 3, 3)).astype(np.int32)
    bits = index_bits(count, ALL_WIDTHS)

    def write(onnx: GraphWriter, end: ir.Node) -> ir.Value:
        return write_levels(onnx, end, "weight", codes, bits, levels.astype(np.float32))

    found, size = read_back(write, codes.shape, ir.DataType.INT8)
    assert np.array_equal(found, levels[codes])
    assert bits == (2 if count <= 4 else 4 if count <= 16 else 8)
    assert size == packed_bytes(bits, codes.size)


def test_three_bits_by_hand() -> None:
    codes = np.array([-4, -3, -2, -1, 0, 1, 2, 3, -1], np.int32)  # as bits 100 101, 110 111, 000 001, 010 011, and 111
    expected = [[0b10_101100, 0b10_111110, 0b01_001000], [0b00_000111, 0, 0]]
    assert pack_three_bits(codes).tolist() == expected


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_loading_takes_little_memory(bits: int, tmp_path: Path) -> None:
    rows = ir.val("rows", dtype=ir.DataType.INT64, shape=ir.Shape([1]))
    y = ir.val("y", dtype=ir.DataType.INT8, shape=ir.Shape([1, 512]))
    end = ir.node("Gather", [ir.val("x"), rows], outputs=[y])
    graph = ir.Graph([rows], [y], nodes=[end], name="packed", opset_imports={"": 25})
    codes = np.maximum(drawn(bits, (4096, 512)), 1 - 2 ** (bits - 1))
    factor = widening(int(codes.min()), int(codes.max()))
    end.replace_input_with(0, Multiplied(GraphWriter(graph)).write(end, "weight", codes, bits, factor))
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    peak = measure_memory(
        tmp_path / "model.onnx",
        device=DeviceProfile(name="test", int8=Int8Form(activations="uint8", reduce_range=False)),
        feeds={"rows": np.array([7])},
    )
    assert peak / codes.size < 20
