"""Small ONNX files to measure, and the machine to measure them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mil_cli.device.host import resolve
from mil_cli.device.profile import DeviceProfile

CHANNELS = 3


def write_conv_net(
    path: Path,
    *,
    channels: int = 32,
    layers: int = 3,
    size: int = 16,
    seed: int = 0,
    external: bool = False,
    input_name: str = "x",
) -> Path:
    """Write a chain of 3x3 convolutions with ReLU on images (batch, 3, size, size)."""
    generator = np.random.default_rng(seed)
    nodes, weights, value, width = [], [], input_name, CHANNELS
    for layer in range(layers):
        kernel = generator.standard_normal((channels, width, 3, 3)).astype(np.float32) / (3 * width**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [value, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        value, width = f"r{layer}", channels
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", CHANNELS, size, size])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", channels, size, size])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


@pytest.fixture(name="write_conv_net")
def _write_conv_net() -> Callable[..., Path]:
    """Return a function that writes a convolutional net to a path."""
    return write_conv_net


@pytest.fixture
def device() -> DeviceProfile:
    """Return this machine's profile."""
    return resolve({"name": "host_cpu"})


@pytest.fixture
def image() -> dict[str, np.ndarray]:
    """Return one sample for the nets of these tests."""
    return {"x": np.random.default_rng(1).standard_normal((1, CHANNELS, 16, 16)).astype(np.float32)}
