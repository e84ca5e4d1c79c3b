"""Post-training quantization with static ranges: integer weights and activations, from some calibration samples."""

from __future__ import annotations

from typing import ClassVar

from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.post_training import PostTrainingConfig, prepare
from mil_cli.stages.registry import stage


class StaticConfig(PostTrainingConfig):
    """Settings of ``quantize/static``: those that all methods after training share.

    Attributes:
        bias_correction: On by default where weights have fewer than 8 bits, which nothing else makes up for here.
    """

    method: ClassVar[str] = "static"
    version: ClassVar[int] = 12

    bias_correction: bool | None = None


@stage(StaticConfig)
@where_faster
@within_drop
def quantize(model: Model, config: StaticConfig, context: Context) -> Model:
    """Return `model` with its batch norms folded and quantizers in its graph, weights rounded to nearest.

    The result computes in float what integer kernels compute; it can be trained further, and its export holds
    integers. Layers whose input was nothing but zeros in calibration stay float. Post-training quantization as in
    Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (2018).

    Args:
        model: A float model.
        config: The settings.
        context: Gives calibration samples and the device's rules.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    return prepare(model, config, context).insert()
