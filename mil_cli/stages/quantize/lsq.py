"""Learned step size quantization: the scales of weights and activations are trained together with the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.events import SilentProgress
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.aware import freeze_norms, place_unfolded, release_norms
from mil_cli.stages.quantize.calibrate import Seen, calibrate, place_observed
from mil_cli.stages.quantize.insert import Quantizer, insert_quantizers, refuse_quantized
from mil_cli.stages.quantize.observers.magnitude import MeanMagnitude
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.placement import Layer, Placement
from mil_cli.stages.quantize.positive import keep_positive, mirror_channels, settle
from mil_cli.stages.quantize.ranges import CodeRange, affine_parameters
from mil_cli.stages.quantize.settings import QuantizationConfig, Rules
from mil_cli.stages.quantize.weights import protect_biases, weight_scale
from mil_cli.stages.registry import stage
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.evaluate import fixed_batch

Initialization = Literal["mse", "mean"]


class LsqConfig(QuantizationConfig):
    """Settings of ``quantize/lsq``, beside those that all quantization shares.

    Attributes:
        initialization: Where the scales start: ``mse`` (smallest squared error of rounding), or ``mean`` (the paper's:
            twice the mean magnitude over the root of the largest code; values that go below 0 start as ``mse`` does).
        distill: Key of a distill (or train) stage of the recipe whose loss trains weights and scales; None: the task's
            loss.
        trainer: Trainer settings over that stage's own: a lower learning rate than the float training's, fewer epochs.
        batch_norm: ``reestimate``: batch norms train as usual, and their statistics are taken anew at the end, without
            augmentation; ``freeze``: they use and keep the statistics that they came with.
        batch_norm_samples: Training samples for the new statistics.
    """

    method: ClassVar[str] = "lsq"
    version: ClassVar[int] = 3

    initialization: Initialization = "mse"
    distill: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)
    batch_norm: Literal["reestimate", "freeze"] = "reestimate"
    batch_norm_samples: int = Field(2048, ge=1)


@stage(LsqConfig)
def quantize(model: Model, config: LsqConfig, context: Context) -> Model:
    """Train a copy of a float model with quantizers whose scales learn, and fold its batch norms.

    Esser et al., Learned Step Size Quantization (2020). Scales start from calibration samples and get the gradient of
    `mil_cli.ops.quantize_affine` times ``1 / sqrt(N * Qp)``, N being the weights that share the scale, or the features
    of one sample, and Qp the largest code. Below 8 bits weights have one more code below 0 than above, as in the
    paper; so that folding keeps them, gammas of batch norms are made and kept positive, and where that cannot be done,
    because norms share one, codes are symmetric. Where the device wants
    one scale for a whole weight, batch norms are folded before the training, since folding gives each channel a scale
    of its own. Layers whose input was nothing but zeros in calibration stay float.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, and the training.

    Returns:
        The model in the form that post-training quantization gives it too: it can be trained further, and exported.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, calibration fails, or there is no
            stage `distill` that trains.
    """
    refuse_quantized(model.graph)
    rules = Rules.of(config, context)
    start = model.clone().eval() if rules.all_per_channel else fold_batch_norm(model)

    def place(silent: Collection[Node]) -> Placement:
        return place_unfolded(start, policy=rules.policy, skip=config.skip, narrow=rules.narrow, silent=silent)

    placement, seen = place_observed(start, place, _ActivationStart, rules, config, context)
    facts = placement.facts()
    _insert(start, placement, seen, rules, config.initialization)
    frozen = freeze_norms(start.graph) if config.batch_norm == "freeze" else {}
    trained = context.finetune(start, stage=config.distill, name="lsq", trainer=config.trainer)
    settle(trained.graph)
    if config.batch_norm == "freeze":
        release_norms(trained.graph, frozen)
    else:
        size = fixed_batch(trained) or config.calibration_batch_size
        trained = recalibrate(trained, context.calibration(samples=config.batch_norm_samples, batch_size=size))
    result = fold_batch_norm(trained)
    protect_biases(result.graph)
    context.note(**facts, **rules.facts(), initialization=config.initialization, batch_norm=config.batch_norm)
    return result


def start_scale(mean: Tensor | float, largest_code: int) -> Tensor:
    """Return the paper's start of a scale, ``2 <|v|> / sqrt(Qp)``, from the mean magnitude of what shares it."""
    return (2 * torch.as_tensor(mean, dtype=torch.float64) / math.sqrt(largest_code)).clamp(min=SMALLEST_SCALE).float()


def _insert(
    model: Model, placement: Placement, seen: Seen[_ActivationStart], rules: Rules, initialization: Initialization
) -> None:
    """Put quantizers with trainable scales into the graph, in place, and keep the gammas positive that they need so."""
    graph = model.graph
    codes = {layer.node: rules.weights(layer) for layer in placement.layers}
    gammas, turned = mirror_channels(model, [node for node, wanted in codes.items() if wanted != wanted.symmetric()])
    codes.update({node: codes[node].symmetric() for node in turned})
    values, narrow = (
        {node: watcher.quantizer(initialization) for node, watcher in watchers.items()}
        for watchers in (seen.values, seen.narrow)
    )
    weights = [_weight(graph, layer, codes[layer.node], rules, initialization) for layer in placement.layers]
    features = _features(model, [*placement.owned, *placement.narrow])
    paths = insert_quantizers(graph, placement, values, narrow, weights)
    factors = dict.fromkeys(gammas, 1.0)
    for forms, places in ((values, paths.values), (narrow, paths.narrow)):
        for node, form in forms.items():
            zero_point = int(form.zero_point)
            largest = max(form.codes.quant_max - zero_point, zero_point - form.codes.quant_min)
            factors[f"{places[node]}.scale"] = 1 / math.sqrt(max(features[node], 1) * largest)
    for layer, form, path in zip(placement.layers, weights, paths.weights, strict=True):
        shared_by = get_attribute(graph, str(layer.weight.target)).numel() / form.scale.numel()
        factors[f"{path}.scale"] = 1 / math.sqrt(shared_by * form.codes.quant_max)
    keep_positive(graph, factors)


class _ActivationStart:
    """Watches an activation for the start of its scale and for its zero point, which stays."""

    def __init__(self, codes: CodeRange) -> None:
        self._codes = codes
        self._range = MeanSquaredError(codes)
        self._magnitude = MeanMagnitude()

    def update(self, values: Tensor) -> None:
        self._range.update(values)
        self._magnitude.update(values)

    def range(self) -> tuple[float, float]:
        return self._range.range()

    def quantizer(self, initialization: Initialization) -> Quantizer:
        scale, zero_point = affine_parameters(*self.range(), self._codes)
        start = torch.tensor(scale)
        if initialization == "mean" and zero_point == self._codes.quant_min:
            start = start_scale(self._magnitude.mean, self._codes.steps)
        return Quantizer(start, torch.tensor(zero_point), self._codes)


def _weight(
    graph: GraphModule, layer: Layer, codes: CodeRange, rules: Rules, initialization: Initialization
) -> Quantizer:
    axis = rules.axis(layer)
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
    if initialization == "mse":
        scale = weight_scale(weight, axis=axis, codes=codes, observer="mse")
    else:
        others = [dimension for dimension in range(weight.ndim) if dimension != axis]
        mean = weight.double().abs().mean(others)
        scale = start_scale(torch.where(mean > 0, mean, mean.max()), codes.quant_max)
    return Quantizer(scale, torch.zeros(scale.shape, dtype=torch.int32), codes, axis)


def _features(model: Model, nodes: Iterable[Node]) -> dict[Node, float]:
    """Return how many numbers of each value belong to one sample."""

    class Size:
        numbers = 0

        def update(self, values: Tensor) -> None:
            self.numbers = values.numel()

        def range(self) -> tuple[float, float]:
            return 0.0, 0.0

    sizes = {node: Size() for node in nodes}
    with SilentProgress().work("sizes") as bar:
        calibrate(model.graph, sizes, [model.samples], bar=bar)
    leaves = zip(model.flat_inputs(*model.samples[0], **model.samples[1]), model.spec.inputs, strict=True)
    found = [leaf.shape[axis] for leaf, spec in leaves if (axis := spec.batch_axis()) is not None]
    samples = found[0] if found else fixed_batch(model) or 1
    return {node: size.numbers / samples for node, size in sizes.items()}
