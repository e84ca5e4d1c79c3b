"""AdaRound: after training, each weight is rounded up or down as it serves the outputs of its layer."""

from __future__ import annotations

from typing import ClassVar

from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.post_training import prepare
from mil_cli.stages.quantize.reconstruct import Beyond, ReconstructionConfig, reconstruct
from mil_cli.stages.quantize.units import layer_units
from mil_cli.stages.registry import stage


class AdaroundConfig(ReconstructionConfig):
    """Settings of ``quantize/adaround``: those that all methods share that learn roundings after training."""

    method: ClassVar[str] = "adaround"


@stage(AdaroundConfig)
@where_faster
@within_drop
def quantize(model: Model, config: AdaroundConfig, context: Context) -> Model:
    """Return `model` quantized as ``quantize/static`` does, but with weights rounded so that layers' outputs stay.

    Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020), with the asymmetric form of its
    loss: a layer reads what the quantized layers before it give, and its outputs, behind a rectifier if one follows,
    are compared with the float model's. Layers whose weights are read elsewhere too keep nearest rounding, as do tables
    of embeddings, whose rows it serves best.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives training samples, the device's rules, seeds and checkpoints.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    prepared = prepare(model, config, context)
    units = layer_units(prepared.model.graph, prepared.placement.products)
    return reconstruct(prepared, units, config, context, beyond=Beyond())
