"""Weight-only quantization: weights in few bits, with a scale for each block of a row; activations stay float."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mil_cli.errors import StageError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.nodes import get_attribute, op_name
from mil_cli.stages.quantize.accuracy import within_drop_by_skipping
from mil_cli.stages.quantize.compensate import Compensation, round_layers
from mil_cli.stages.quantize.describe import LayerBits
from mil_cli.stages.quantize.holding import BoundedConfig
from mil_cli.stages.quantize.insert import QuantizerWriter, refuse_quantized
from mil_cli.stages.quantize.layers import NO_TABLES, Layer, find_layers, once_for_each_weight
from mil_cli.stages.quantize.ranges import CodeRange, weight_codes
from mil_cli.stages.quantize.settle import fold_weights
from mil_cli.stages.quantize.weights import WeightObserverName, weight_scale
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_LEFT_OUT = dict.fromkeys(
    ("lstm", "gru", "rnn_tanh", "rnn_relu", "einsum", "addmm", "baddbmm"),
    "only weights of linear layers, convolutions and embeddings are rounded",
)
_SHORT_SCALE = 16
"""Bits of a block's scale in the file."""


class WeightOnlyConfig(BoundedConfig):
    """Settings of weight-only quantization.

    Attributes:
        weight_bits: Bits of weights.
        first_last_bits: Bits of layers right after an input or right before an output, if that is more; embeddings have
            `weight_bits`.
        block_size: Neighbours in an output's row of weights that share a scale; None: the whole row does.
        embeddings: Whether tables of embeddings are rounded too.
        rounding: ``nearest``, or ``gptq``: each rounding error is made up for by the weights that are rounded next.
        weight_observer: How the range of weights is found.
        calibration_samples: For gptq: how many training samples are looked at, without augmentation.
        calibration_batch_size: How many of them at once.
        damping: For gptq: share of the mean curvature that is added to each.
        act_order: For gptq: whether inputs with the largest curvature are rounded first.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "weight_only"
    version: ClassVar[int] = 3
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: Literal[2, 3, 4, 8] = 4
    first_last_bits: Literal[2, 3, 4, 8] = 8
    block_size: Literal[32, 64, 128] | None = 64
    embeddings: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    weight_observer: WeightObserverName = "mse"
    calibration_samples: int = Field(256, ge=1)
    calibration_batch_size: int = Field(64, ge=1)
    damping: float = Field(0.01, gt=0, le=1)
    act_order: bool = True


def _names(model: Model, config: WeightOnlyConfig, context: Context) -> list[str]:
    """Return the names of the layers whose weights would be rounded."""
    return [layer.name for sharing in _found(model, config)[1] for layer in sharing]


@stage(WeightOnlyConfig)
@within_drop_by_skipping(_names, rounding="nearest")
def quantize(model: Model, config: WeightOnlyConfig, context: Context) -> Model:
    """Return `model` with its batch norms folded and its weights rounded to few bits, block by block.

    The form of Frantar et al., GPTQ (ICLR 2023, arXiv:2210.17323), and Dettmers and Zettlemoyer, "The case for 4-bit
    precision" (ICML 2023, arXiv:2212.09720): blocks of a row have symmetric codes with a scale each. The file becomes
    smaller; onnxruntime makes floats of the weights when it loads it, and takes the float model's time.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives calibration samples for gptq, val for `max_drop`, and checkpoints; is told what the report shows.

    Raises:
        StageError: The model is quantized already, or it has no weight to round.
    """
    refuse_quantized(model.graph)
    quantized, weights, kept_float = _found(model, config)
    if not weights:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept_float.items())
        raise StageError("no weight of the model can be rounded", value=reasons or "it has no layer with weights")
    writer = QuantizerWriter(quantized.graph)
    stored = numbers = 0
    for sharing in weights:
        size, bits = _insert(quantized.graph, writer, sharing, config)
        numbers, stored = numbers + size, stored + bits
    writer.finish()
    context.note(
        weight_bits=config.weight_bits,
        first_last_bits=config.first_last_bits,
        block_size=config.block_size,
        rounding=config.rounding,
        quantized_weights=len(weights),
        bits_per_weight=stored / numbers,
        kept_float=kept_float,
    )
    if config.rounding == "gptq":
        how = Compensation(config.calibration_samples, config.calibration_batch_size, config.damping, config.act_order)
        solvable = [layer for sharing in weights for layer in sharing if _has_curvature(layer)]
        round_layers(quantized, solvable, how, context)
    return quantized


def planned_bits(model: Model, config: WeightOnlyConfig) -> LayerBits:
    """Return which bits the layers of a float model would have.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    _, weights, kept_float = _found(model, config)
    found = LayerBits(kept_float=kept_float)
    for sharing in weights:
        found.bits.update({layer.node.name: (_bits(sharing, config), None) for layer in sharing})
    return found


def _found(model: Model, config: WeightOnlyConfig) -> tuple[Model, list[list[Layer]], dict[str, str]]:
    """Return a folded copy of a model, its layers by weight, and why others stay float."""
    folded = fold_weights(model)
    make_functional(folded.graph)
    never = _LEFT_OUT if config.embeddings else {**_LEFT_OUT, **NO_TABLES}
    layers, kept_float, _ = find_layers(folded.graph, skip=config.skip, never=never, whole=True)
    shared = once_for_each_weight(layers, lambda layer: list(layer.sharing))
    return folded, list({id(sharing): sharing for sharing in shared}.values()), kept_float


def _has_curvature(layer: Layer) -> bool:
    return not layer.looks_up and not op_name(layer.node).startswith("conv_transpose")


def _bits(sharing: list[Layer], config: WeightOnlyConfig) -> int:
    edge = any(layer.edge for layer in sharing)
    return max(config.weight_bits, config.first_last_bits) if edge else config.weight_bits


def _insert(
    graph: GraphModule, writer: QuantizerWriter, sharing: list[Layer], config: WeightOnlyConfig
) -> tuple[int, int]:
    """Quantize a weight for all of its layers; returns how many numbers it has, and the bits that they take."""
    first = sharing[0]
    weight = get_attribute(graph, str(first.weight.target))
    bits = _bits(sharing, config)
    codes = weight_codes(bits, reduce_range=False)
    rows = weight.detach().movedim(first.axis, 0).reshape(weight.shape[first.axis], -1)
    size = rows.shape[1] if config.block_size is None else min(config.block_size, rows.shape[1])
    scale = _scales(rows, size, codes, config.weight_observer)
    path = writer.store(f"{first.name}_weight", scale)
    for node in dict.fromkeys(layer.weight for layer in sharing):
        readers = [layer.node for layer in sharing if layer.weight is node]
        writer.insert_blocks(node, path, axis=first.axis, block_size=size, codes=codes, readers=readers)
    return weight.numel(), bits * weight.numel() + scale.numel() * (_SHORT_SCALE if scale.shape[1] > 1 else 32)


def _scales(rows: Tensor, size: int, codes: CodeRange, observer: WeightObserverName) -> Tensor:
    """Return the scale of each block of some rows, ``[rows, blocks]``; where there are several, 16 bits hold each."""
    blocks = -(-rows.shape[1] // size)
    parts = functional.pad(rows, (0, blocks * size - rows.shape[1])).reshape(-1, size)
    scale = weight_scale(parts, axis=0, codes=codes, observer=observer).reshape(len(rows), blocks)
    return scale.bfloat16().float() if blocks > 1 else scale
