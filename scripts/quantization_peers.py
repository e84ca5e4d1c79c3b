"""Other quantizers, each given the same model, calibration samples and bits, for the comparison of quantization.

    pip install nncf==3.4.0 torchao==0.18.0 brevitas==0.13.4

Each is optional. First and last layer have 8 bits everywhere, weights a scale for each output channel, activations
unsigned codes with a zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from mil_cli.device.profile import DeviceProfile
from mil_cli.export.session import feeds_of
from mil_cli.graph.model import Model

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Predict = Callable[..., Any]
Feeds = dict[str, "npt.NDArray[Any]"]

EIGHT = 8
"""Bits of the first and the last layer."""


@dataclass(frozen=True)
class Bits:
    """How fine a setting is.

    Attributes:
        weights: Bits of weights.
        activations: Bits of what layers read.
    """

    weights: int
    activations: int


@dataclass(frozen=True)
class Material:
    """What every peer is given.

    Attributes:
        model: The uncompressed model.
        module: The user's module with the same weights.
        file: The uncompressed model as ONNX file.
        calls: (args, kwargs) of each batch of calibration samples.
        device: Says whether 8-bit weights have to keep to 7 bits.
        folder: Where files may be written.
    """

    model: Model
    module: nn.Module
    file: Path
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    device: DeviceProfile
    folder: Path

    def feeds(self) -> list[Feeds]:
        """Return the batches as the ONNX file takes them."""
        return [feeds_of(self.model.spec, args, kwargs) for args, kwargs in self.calls]


@dataclass(frozen=True)
class Peer:
    """Another quantizer.

    Attributes:
        package: What has to be installed.
        version: In which version; None: that of this project.
        modules: What is imported before the clock starts.
        offers: The bits that it has.
        quantize: Gives an ONNX file, or what is called as the model where there is none.
        said: What the page says of it.
    """

    package: str
    version: str | None
    modules: tuple[str, ...]
    offers: Callable[[Bits], bool]
    quantize: Callable[[Material, Bits], Path | Predict]
    said: str

    def gap(self) -> str | None:
        """Return why the peer cannot be run here; None: it can."""
        try:
            found = metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        if self.version not in (None, found):
            return f"{self.package} {self.version} is asked for and {found} is installed"
        return None

    def release(self) -> str:
        """Return package and version that rows are of."""
        return f"{self.package} {self.version or metadata.version(self.package)}"


def _ends(file: Path) -> tuple[str, str]:
    """Return the names of the first and the last layer's weight in an ONNX file."""
    nodes = [node for node in onnx.load(file).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return nodes[0].input[1], nodes[-1].input[1]


def _onnxruntime(method: str, material: Material, bits: Bits) -> Path:
    """Quantize the exported file by onnxruntime's static quantizer, after the preparation that it recommends."""
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(material.feeds())

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

    prepared, result = material.folder / "prepared.onnx", material.folder / "quantized.onnx"
    ort.quant_pre_process(material.file, prepared, skip_symbolic_shape=True)
    # Its 4-bit weights take no range of their own for single tensors but by this option.
    finer = {name: [{"quant_type": ort.QuantType.QInt8, "axis": 0}] for name in _ends(prepared)}
    ort.quantize_static(
        prepared,
        result,
        Reader(),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=material.device.int8.reduce_range,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8 if bits.weights == EIGHT else ort.QuantType.QInt4,
        calibrate_method=ort.CalibrationMethod[method],
        extra_options={} if bits.weights == EIGHT else {"TensorQuantOverrides": finer},
    )
    return result


def _nncf(material: Material, bits: Bits) -> Path:
    """Quantize the exported file by NNCF with its defaults: ranges, and biases corrected; 8 bits is all that it has."""
    import nncf

    result = material.folder / "quantized.onnx"
    feeds = material.feeds()
    onnx.save(nncf.quantize(onnx.load(material.file), nncf.Dataset(feeds), subset_size=len(feeds)), result)
    return result


def _torchao(material: Material, bits: Bits) -> Predict:
    """Quantize the exported program by PT2E: histograms for activations, extremes for weights, nearest rounding."""
    from torch.fx import GraphModule, Node
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e import quantizer as pt2e
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    aten = torch.ops.aten

    def values(width: int) -> pt2e.QuantizationSpec:
        return pt2e.QuantizationSpec(
            torch.uint8, HistogramObserver, quant_min=0, quant_max=2**width - 1, qscheme=torch.per_tensor_affine
        )

    def weights(width: int) -> pt2e.QuantizationSpec:
        return pt2e.QuantizationSpec(
            torch.int8,
            PerChannelMinMaxObserver,
            quant_min=-(2 ** (width - 1)),
            quant_max=2 ** (width - 1) - 1,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    class Quantizer(pt2e.Quantizer):  # type: ignore[misc]
        def annotate(self, model: GraphModule) -> GraphModule:
            layers = [node for node in model.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
            for node in layers:
                end = node in (layers[0], layers[-1])
                own = Bits(EIGHT, EIGHT) if end else bits
                self._read(node, {0: values(own.activations), 1: weights(own.weights)})
            for node in model.graph.nodes:
                if node.target in (aten.add.Tensor, aten.add_.Tensor):
                    self._read(node, dict.fromkeys((0, 1), values(EIGHT)))
            return model

        def _read(self, node: Node, specs: Mapping[int, pt2e.QuantizationSpec]) -> None:
            node.meta["quantization_annotation"] = pt2e.QuantizationAnnotation(
                input_qspec_map={node.args[index]: spec for index, spec in specs.items()}, _annotated=True
            )

        def validate(self, model: GraphModule) -> None:
            """Take every annotation."""

    prepared = prepare_pt2e(material.model.export_program().module(), Quantizer())
    with torch.no_grad():
        for args, kwargs in material.calls:
            prepared(*args, **kwargs)
    return convert_pt2e(prepared)


def _brevitas(material: Material, bits: Bits, *, compensate: bool) -> Predict:
    """Quantize the user's module by Brevitas: least squared errors, GPTQ if asked for, and biases corrected."""
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas.inject import value
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloatMSE
    from brevitas_examples.imagenet_classification.ptq import ptq_common
    from torch import nn

    ((images,), _) = material.calls[0]

    def width(inner: int) -> Any:
        @value  # type: ignore[misc]
        def of(module: nn.Module) -> int:
            end = isinstance(module, nn.Linear) or module.in_channels == images.shape[1]
            return EIGHT if end else inner

        return of

    settings = {
        "weight_quant": Int8WeightPerChannelFloatMSE.let(bit_width=width(bits.weights)),
        "input_quant": ShiftedUint8ActPerTensorFloatMSE.let(bit_width=width(bits.activations)),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    layers = {nn.Conv2d: (QuantConv2d, settings), nn.Linear: (QuantLinear, settings)}
    loader = [(args[0], None) for args, _ in material.calls]
    model = layerwise_quantize(preprocess_for_quantize(material.module), compute_layer_map=layers)
    with torch.no_grad():
        model(images)  # scales exist from here on
    ptq_common.calibrate(loader, model)
    if compensate:
        ptq_common.apply_gptq(loader, model, act_order=True)
    ptq_common.apply_bias_correction(loader, model)
    return model.eval()


def for_rounding(bits: Bits) -> bool:
    """Whether bits are a setting for methods that do not train: activations of 2 bits are not."""
    return bits.activations > 2


def _eight_bit_activations(bits: Bits) -> bool:
    return bits.activations == EIGHT and bits.weights in (4, EIGHT)


PEERS = {
    "ort_min_max": Peer(
        "onnxruntime",
        None,
        ("onnxruntime.quantization",),
        _eight_bit_activations,
        partial(_onnxruntime, "MinMax"),
        "onnxruntime's `quantize_static`, QDQ, with its default ranges; 8-bit activations, weights of 8 or 4 bits",
    ),
    "ort_percentile": Peer(
        "onnxruntime",
        None,
        ("onnxruntime.quantization",),
        _eight_bit_activations,
        partial(_onnxruntime, "Percentile"),
        "the same with ranges by percentile",
    ),
    "nncf": Peer(
        "nncf",
        "3.4.0",
        ("nncf",),
        lambda bits: bits == Bits(EIGHT, EIGHT),
        _nncf,
        "NNCF's `quantize` on the ONNX file with its defaults; it has 8 bits only",
    ),
    "torchao": Peer(
        "torchao",
        "0.18.0",
        ("torchao.quantization.pt2e.quantize_pt2e",),
        for_rounding,
        _torchao,
        "torchao's PT2E with histograms, and sums in 8 bits; scored in PyTorch, no file",
    ),
    "brevitas": Peer(
        "brevitas",
        "0.13.4",
        ("brevitas_examples.imagenet_classification.ptq.ptq_common",),
        for_rounding,
        partial(_brevitas, compensate=False),
        "Brevitas layer by layer, least squared errors, biases corrected; sums stay float; scored in PyTorch, no file",
    ),
    "brevitas_gptq": Peer(
        "brevitas",
        "0.13.4",
        ("brevitas_examples.imagenet_classification.ptq.ptq_common",),
        for_rounding,
        partial(_brevitas, compensate=True),
        "the same after its GPTQ",
    ),
}
"""By the name that rows and page have for it."""
