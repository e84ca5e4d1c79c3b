"""PACT: activations are clipped where it was learned to pay, and rounded; weights are those of DoReFa."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.fx import GraphModule

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.aware import AwareConfig, train_quantized
from mil_cli.stages.quantize.calibrate import Seen, ranged_quantizers
from mil_cli.stages.quantize.insert import insert_quantizers, quantizers_at, replace_quantizer
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.layers import once_for_each_weight
from mil_cli.stages.quantize.learned import largest_code
from mil_cli.stages.quantize.observers import Observer
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.positive import keep_positive
from mil_cli.stages.quantize.settings import ObservedConfig, Rules
from mil_cli.stages.quantize.squashed import squash, squashed
from mil_cli.stages.registry import stage
from mil_cli.training.objective import StepHook


class PactConfig(AwareConfig, ObservedConfig):
    """Settings of ``quantize/pact``, beside those that all training with quantizers shares.

    Attributes:
        observer: How the range is found that the clip of activations starts from; as for ``quantize/static``.
        clip_decay: Weight decay of the clips: what draws them in, where rounding gains by it.
    """

    method: ClassVar[str] = "pact"

    clip_decay: float = Field(1e-4, ge=0, allow_inf_nan=False)


@stage(PactConfig)
@where_faster
@within_drop
def quantize(model: Model, config: PactConfig, context: Context) -> Model:
    """Train a copy of a float model with activations whose clips learn, and fold its batch norms.

    Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks": ``clip(x, 0, alpha)``,
    rounded to ``2^bits - 1`` steps; alpha gets the gradient of what lies beyond it (see
    `mil_cli.ops.quantize_clipped`) and a weight decay of its own. Here alpha starts from calibration samples instead of
    a constant, and values that go below 0 keep the zero point of calibration, so that both ends move together. Weights
    are those of ``quantize/dorefa``, as in the paper.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, and the training.

    Returns:
        The model in the form that post-training quantization gives it too, weights on levels: it can be trained
        further, and exported.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, calibration fails, or there is no
            stage `distill` that trains.
    """
    context.note(observer=config.observer, clip_decay=config.clip_decay)
    return train_quantized(
        model, config, context, watcher=config.watcher, insert=_insert, before_step=decay_clips(config.clip_decay)
    )


def _insert(model: Model, placement: Placement, seen: Seen[Observer], rules: Rules) -> None:
    graph = model.graph
    values, narrow = ranged_quantizers(seen)
    weights = once_for_each_weight(placement.layers, lambda layer: squashed(graph, layer, rules))
    paths = insert_quantizers(graph, placement, values, narrow, weights)
    squash(graph, placement.layers, weights, paths.weights, rules)
    factors: dict[str, float] = {}
    for forms, places in ((values, paths.values), (narrow, paths.narrow)):
        for node, form in forms.items():
            # The parameter is the step. A step of descent then moves the clip, which is `largest_code` steps away from
            # 0, as far as one on the clip itself would.
            factors[f"{places[node]}.scale"] = 1 / largest_code(form) ** 2
            _clip(graph, places[node])
    keep_positive(graph, factors)


def _clip(graph: GraphModule, path: str) -> None:
    """Give the quantizers below `path` the gradient of PACT, in place."""
    for node in quantizers_at(graph, path):
        arguments = [get_argument(node, name) for name in ("x", "scale", "zero_point", "quant_min", "quant_max")]
        replace_quantizer(graph, node, torch.ops.mil.quantize_clipped.default, tuple(arguments))


def decay_clips(strength: float) -> StepHook:
    """Return what adds the gradient of ``strength / 2 * clip^2`` for every clip, before each step of the optimizer."""

    def before_step(training: Model, steps: int, total: int) -> None:
        graph = training.graph
        learned = [get_argument(node, "scale") for node in calls(graph) if op_name(node) == "quantize_clipped"]
        for name in {str(get_argument(node, "scale").target) for node in learned}:
            parameter = get_attribute(graph, name)
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=strength)

    return before_step
