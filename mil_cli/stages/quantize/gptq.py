"""GPTQ: integer weights and activations after training, each weight's rounding error made up for by the next ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.compensate import Compensation, round_layers
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.post_training import PostTrainingConfig, prepare
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class GptqConfig(PostTrainingConfig):
    """Settings of ``quantize/gptq``, beside those that all methods after training share.

    Attributes:
        damping: Share of the mean curvature that is added to each, so that it can be inverted; where that does not do,
            ten and a hundred times as much are tried.
        act_order: Whether inputs with the largest curvature are rounded first, while most others can still make up for
            them; scales are found before, so that it costs nothing at run time.
    """

    method: ClassVar[str] = "gptq"

    damping: float = Field(0.01, gt=0, le=1)
    act_order: bool = True


@stage(GptqConfig)
@where_faster
@within_drop
def quantize(model: Model, config: GptqConfig, context: Context) -> Model:
    """Return `model` quantized as ``quantize/static`` does, but for how weights are rounded.

    Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (ICLR 2023,
    arXiv:2210.17323), for linear layers and convolutions; each layer sees what the quantized ones before it give, with
    activations in their integer codes. An output's error over the calibration samples is never above that of rounding
    to nearest: where it would be, that output is rounded to nearest. Layers whose weights others read too are, and
    tables of embeddings: a row is all of an output, and nothing else could make up for its errors.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives calibration samples, checkpoints and the device's rules.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    prepared = prepare(model, config, context)
    quantized = prepared.insert(correct=False)
    how = Compensation(config.calibration_samples, config.calibration_batch_size, config.damping, config.act_order)
    round_layers(quantized, prepared.placement.products, how, context)
    prepared.correct()
    return quantized
