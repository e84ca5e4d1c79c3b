"""Packed codes against what onnxruntime reads out of them, for every width."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mil_cli.export.packing import pack_three_bits, write_codes
from mil_cli.export.surgery import GraphWriter


def read_back(codes: np.ndarray, bits: int, dtype: ir.DataType) -> tuple[np.ndarray, int]:
    """Return what onnxruntime makes of written codes, and the bytes of the initializer that holds them."""
    y = ir.val("y", dtype=dtype, shape=ir.Shape(codes.shape))
    end = ir.node("Identity", [ir.val("x")], outputs=[y])
    graph = ir.Graph([], [y], nodes=[end], name="packed", opset_imports={"": 25})
    writer = GraphWriter(graph)
    end.replace_input_with(0, write_codes(writer, end, "codes", codes.astype(np.int32), bits, dtype))
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    (held,) = (tensor for tensor in proto.graph.initializer if tensor.name == "codes")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0]), len(held.raw_data)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (4, 2, 3, 3), (1,)])
def test_codes_come_back(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    for dtype in (ir.DataType.INT8, ir.DataType.FLOAT):
        found, size = read_back(codes, bits, dtype)
        assert found.dtype == dtype.numpy()
        assert np.array_equal(found, codes)
        whole = 3 * -(-codes.size // 8) if bits == 3 else -(-codes.size * bits // 8)
        assert size == whole


def test_three_bits_by_hand() -> None:
    codes = np.array([-4, -3, -2, -1, 0, 1, 2, 3, -1], np.int32)  # as bits 100 101 110 111 000 001 010 011, and 111
    expected = [[0b10101010, 0b11001100, 0b00001111], [1, 1, 1]]
    assert pack_three_bits(codes).tolist() == [[three] for three in expected]
