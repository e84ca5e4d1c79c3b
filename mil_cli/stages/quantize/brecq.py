"""BRECQ: after training, the roundings of a residual block are learned together, and its activation steps too."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.post_training import prepare
from mil_cli.stages.quantize.reconstruct import Beyond, ReconstructionConfig, reconstruct
from mil_cli.stages.quantize.units import block_units
from mil_cli.stages.registry import stage


class BrecqConfig(ReconstructionConfig):
    """Settings of ``quantize/brecq``, beside those that all methods share that learn roundings after training.

    Attributes:
        step_rate: Adam's learning rate of activation steps, as a share of each; it falls to 0 along a cosine. 0: the
            steps stay as calibration found them.
        drop: QDrop: the share of activations that stay unquantized while a block learns, drawn anew each time; 0: none.
        fisher: Whether errors count by the squared gradient of the task's loss, which needs labels.
    """

    method: ClassVar[str] = "brecq"

    step_rate: float = Field(4e-4, ge=0, lt=0.1)
    drop: float = Field(0.0, ge=0, lt=1)
    fisher: bool = False


@stage(BrecqConfig)
@where_faster
@within_drop
def quantize(model: Model, config: BrecqConfig, context: Context) -> Model:
    """Return a quantized `model` whose roundings were learned so that the outputs of residual blocks stay.

    Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021): errors within a
    block may cancel, across blocks they hardly do. Blocks are found on the graph; layers outside of any are learned
    alone. With `drop`, Wei et al., QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
    Quantization (2022): learning sees activations quantized and not, so that it fits more than its samples. Each
    scale of activations is learned by the first block that reads it.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives training samples, the device's rules, seeds and checkpoints.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    prepared = prepare(model, config, context)
    units = block_units(prepared.model.graph, prepared.placement.products)
    beyond = Beyond(step_rate=config.step_rate, drop=config.drop, fisher=config.fisher)
    return reconstruct(prepared, units, config, context, beyond=beyond)
