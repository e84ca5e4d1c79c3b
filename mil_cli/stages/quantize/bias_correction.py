"""Empirical bias correction: what rounding shifts the mean of a layer's outputs by is taken off its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.fx import GraphModule

from mil_cli.graph.fold import free_bias, reads_alone
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_argument, get_attribute, schema_index, set_argument, set_attribute
from mil_cli.stages.quantize.calibrate import batches_of, observe, observe_with
from mil_cli.stages.quantize.observers.channels import ChannelMean
from mil_cli.stages.quantize.rescale import channel_axis

if TYPE_CHECKING:
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.layers import Layer
    from mil_cli.stages.quantize.placement import Placement
    from mil_cli.stages.quantize.settings import QuantizationConfig


@dataclass(frozen=True)
class BiasCorrection:
    """Restores the mean of each channel that a layer makes, one layer after the other.

    As in Nagel et al., Data-free quantization through weight equalization and bias correction (2019,
    arXiv:1906.04721), section 4.2 and appendix D, the empirical form.

    Attributes:
        layers: The layers that can have a bias, and have none that is computed in the graph, in order of execution.
        means: For each the mean of each channel in the float model, float64 ``[channels]``.
        config: Says how many calibration samples are looked at.
        context: Gives them.
    """

    layers: list[Layer]
    means: list[Tensor]
    config: QuantizationConfig
    context: Context

    @classmethod
    def of(cls, model: Model, placement: Placement, config: QuantizationConfig, context: Context) -> BiasCorrection:
        """Take the means of a float model before its layers are quantized.

        Raises:
            StageError: There are no samples, or a value is NaN or infinite.
        """
        able = [layer for layer in placement.layers if schema_index(layer.node, "bias") is not None]
        layers = [layer for layer in able if get_argument(layer.node, "bias") is layer.bias]
        seen = {layer.node: ChannelMean(channel_axis(layer.node)) for layer in layers}
        observe(model, seen, config, context)
        return cls(layers, [seen[layer.node].mean for layer in layers], config, context)

    def apply(self, model: Model) -> None:
        """Correct the biases of the model that the means were taken of, now quantized, in place.

        Each layer sees the inputs that the corrected layers before it make. A run that was killed goes on after the
        last layer that was corrected.
        """
        slot, start = self.context.slot("bias_correction"), model.fingerprint()
        state = slot.load()
        if state is None or state["start"] != start:  # a method may correct several models, one after the other
            state = {"start": start, "shifts": []}
        shifts: list[Tensor] = state["shifts"]
        passes = batches_of(model, self.config, self.context)
        steps = passes * len(self.layers)
        with self.context.progress.work("correcting biases", steps, done=passes * len(shifts)) as bar:
            for position, (layer, mean) in enumerate(zip(self.layers, self.means, strict=True)):
                if position == len(shifts):
                    found = ChannelMean(channel_axis(layer.node))
                    observe_with(model, {layer.node: found}, self.config, self.context, bar=bar)
                    shifts.append(mean - found.mean)
                    slot.save(state)
                _add_to_bias(model.graph, layer, shifts[position])
        self.context.note(corrected_biases=len(self.layers))


def _add_to_bias(graph: GraphModule, layer: Layer, shift: Tensor) -> None:
    """Add ``[channels]`` to a layer's bias; one that it lacks, or shares, it gets for itself."""
    weight: Tensor = get_attribute(graph, str(layer.weight.target))
    bias = get_argument(layer.node, "bias")
    before = weight.new_zeros(()) if bias is None else get_attribute(graph, str(bias.target))
    value = (before.detach().double() + shift).to(weight.dtype)
    name = str(bias.target) if reads_alone(graph, bias, layer.node) else free_bias(graph, str(layer.weight.target))
    set_attribute(graph, name, nn.Parameter(value, requires_grad=weight.requires_grad))
    if bias is None or name != str(bias.target):
        with graph.graph.inserting_before(layer.node):
            set_argument(layer.node, "bias", graph.graph.get_attr(name))
        graph.recompile()
