"""SmoothQuant: outliers of activations are moved into weights, which are easier to quantize."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, module_path, op_name
from mil_cli.graph.segment import overwritten
from mil_cli.stages.quantize.calibrate import observe
from mil_cli.stages.quantize.layers import NEVER, find_layers
from mil_cli.stages.quantize.observers.channels import ChannelMagnitude
from mil_cli.stages.quantize.rescale import LAYERS, Link, find_links, move, read_range

if TYPE_CHECKING:
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.settings import QuantizationConfig


_FLOOR = 1e-5
"""The smallest factor, and the smallest weight that counts as it is."""


def smooth(
    model: Model, strength: float, config: QuantizationConfig, context: Context, *, never: Mapping[str, str] = NEVER
) -> None:
    """Move factors of channels from activations into the weights that read them, in place; outputs stay the same.

    With the largest activation ``a`` and the largest weight ``w`` of a channel, the activation is divided by
    ``a^strength / w^(1 - strength)``, in the norm, gain or layer that makes it, and all weights that read it are
    multiplied. As in Xiao et al., SmoothQuant (2023, arXiv:2211.10438). Where something else reads what a norm makes,
    as in transformers that add before the norm, a product with ``[channels]`` restores it for that reader, if one of
    the layers will be quantized. Layers whose input is made by nothing that could take a factor, such as a GELU, are
    left as they are and listed.

    Args:
        model: A model in evaluation mode, batch norms folded, in-place operators replaced.
        strength: 0 moves nothing but evens out the weights, 1 gives all channels of an activation the same range.
        config: Says how many calibration samples are looked at, and which layers stay float.
        context: Gives them, and is told which layers were smoothed.
        never: Operator -> why it stays float.

    Raises:
        StageError: There are no samples, a value is NaN or infinite, or a pattern of `skip` fits no layer.
    """
    links = _links(model.graph, config.skip, never)
    seen = {link.value: ChannelMagnitude(link.axis) for link in links}
    observe(model, seen, config, context)
    for link in links:
        activation = seen[link.value].largest
        weight = functools.reduce(torch.maximum, (read_range(model.graph, reader) for reader in link.readers))
        # A channel of zeros on either side has nothing to move. The floors are those of the paper's code: what divides
        # by next to nothing would leave the range of floats.
        wanted = (activation**strength / weight.clamp(min=_FLOOR) ** (1 - strength)).clamp(min=_FLOOR)
        factor = torch.where((activation > 0) & (weight > 0), wanted, 1.0)
        move(model.graph, link, factor)
    smoothed = {reader for link in links for reader in link.readers}
    left = [node for node in calls(model.graph) if op_name(node) in LAYERS and node not in smoothed]
    model.graph.graph.lint()
    model.graph.recompile()
    context.note(
        smoothed_layers=len(smoothed),
        not_smoothed=[module_path(node) or node.name for node in left if get_argument(node, "weight").op == "get_attr"],
    )
    if not smoothed:
        context.progress.notice(f"{context.name}: smooth moves nothing: no norm or layer alone makes what layers read")


def _links(graph: GraphModule, skip: Sequence[str], never: Mapping[str, str]) -> list[Link]:
    """Find what can be smoothed; a value is restored only where it stays as it was made and that gains something."""
    quantized = {layer.node for layer in find_layers(graph, skip=skip, never=never).layers}
    changed = overwritten(graph)
    return [
        link
        for link in find_links(graph, restoring=True)
        if not link.others or (link.value not in changed and quantized.intersection(link.readers))
    ]
