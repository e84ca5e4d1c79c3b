"""What the methods share whose scales train together with the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.fx import Node

from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.quantize.calibrate import calibrate
from mil_cli.stages.quantize.insert import Paths, Quantizer, insert_quantizers
from mil_cli.stages.quantize.layers import Layer
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.positive import keep_positive, mirror_channels
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.training.evaluate import fixed_batch


def one_sided_codes(model: Model, layers: Sequence[Layer], rules: Rules) -> tuple[dict[Node, CodeRange], list[str]]:
    """Return the codes of layers' weights, and the gammas that must stay positive for them.

    Below 8 bits weights have one more code below 0 than above. So that folding keeps them, gammas of batch norms are
    made positive, in place; where that cannot be done, because norms share one, codes are symmetric.

    Args:
        model: The model; its weights are changed, its outputs are not.
        layers: Its layers.
        rules: Give the codes.
    """
    codes = {layer.node: rules.weights(layer) for layer in layers}
    gammas, turned = mirror_channels(model, [node for node, wanted in codes.items() if wanted != wanted.symmetric()])
    codes.update({node: codes[node].symmetric() for node in turned})
    return codes, gammas


def insert_learned(
    model: Model,
    placement: Placement,
    values: Mapping[Node, Quantizer],
    narrow: Mapping[Node, Quantizer],
    weights: Sequence[Quantizer],
    *,
    gammas: Iterable[str] = (),
) -> Paths:
    """Put quantizers with trainable scales into a graph, in place.

    Their gradients get the factor of Esser et al., Learned Step Size Quantization (2020): ``1 / sqrt(N * Qp)``, N being
    the weights that share the scale, or the features of one sample, and Qp the largest code.

    Args:
        model: The model.
        placement: Where quantizers go in its graph.
        values: For each owned value how it starts.
        narrow: For each value that layers read in fewer bits how that starts.
        weights: For each layer of the placement how its weight starts, in its order.
        gammas: Names of gammas to train by their magnitude.
    """
    graph = model.graph
    features = _features(model, [*placement.owned, *placement.narrow])
    paths = insert_quantizers(graph, placement, values, narrow, weights)
    factors = dict.fromkeys(gammas, 1.0)
    for forms, places in ((values, paths.values), (narrow, paths.narrow)):
        for node, form in forms.items():
            factors[f"{places[node]}.scale"] = step_factor(features[node], largest_code(form))
    for layer, form, path in zip(placement.layers, weights, paths.weights, strict=True):
        shared_by = get_attribute(graph, str(layer.weight.target)).numel() / form.scale.numel()
        factors[f"{path}.scale"] = step_factor(shared_by, form.codes.quant_max)
    keep_positive(graph, factors)
    return paths


def largest_code(form: Quantizer) -> int:
    """Return how many steps the farther end of an activation's range lies from 0."""
    zero_point = int(form.zero_point)
    return max(form.codes.quant_max - zero_point, zero_point - form.codes.quant_min)


def step_factor(shared_by: float, largest: int) -> float:
    """Return the factor on the gradient of a scale that so many values share."""
    return 1 / math.sqrt(max(shared_by, 1) * largest)


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
