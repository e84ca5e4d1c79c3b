"""Taking the running statistics of batch norms anew from data, where the channels before them changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_argument

STATISTICS = ("running_mean", "running_var")
"""The arguments of a batch norm that hold its running statistics."""


def recalibrate(model: Model, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> Model:
    """Return a copy whose batch norms hold the statistics of some data, averaged over batches of equal weight.

    A norm that reads one value a channel, as one over the features of a model that takes single samples does, keeps
    what it has: one value has no variance.

    Args:
        model: A model in evaluation mode; not changed.
        calls: Inputs as (args, kwargs), without augmentation.
    """
    result = model.clone().eval()
    nodes = [node for node in norms_with_statistics(result) if not _reads_one_value(node)]
    if not nodes:
        return result
    before = [(bool(get_argument(node, "training")), float(get_argument(node, "momentum"))) for node in nodes]
    buffers = {
        str(source.target): get_attribute(result.graph, str(source.target))
        for node in nodes
        for source in (get_argument(node, name) for name in STATISTICS)
    }
    uses: Counter[int] = Counter()
    for node in nodes:
        buffer = id(get_attribute(result.graph, str(get_argument(node, STATISTICS[0]).target)))
        uses[buffer] += 1
        set_argument(node, "training", True)
        # The buffers then hold the statistics of the last batch: the mean over its uses, where a norm is used again.
        set_argument(node, "momentum", 1.0 / uses[buffer])
    result.graph.recompile()
    sums: dict[str, Tensor] = {name: torch.zeros_like(buffer, dtype=torch.float64) for name, buffer in buffers.items()}
    batches = 0
    with torch.no_grad():
        for args, kwargs in calls:
            result.graph(*args, **kwargs)
            batches += 1
            for name, buffer in buffers.items():
                sums[name] += buffer.double()
        for name, buffer in buffers.items():
            if batches:
                buffer.copy_(sums[name] / batches)
    for node, (training, momentum) in zip(nodes, before, strict=True):
        set_argument(node, "training", training)
        set_argument(node, "momentum", momentum)
    result.graph.recompile()
    return result


def recalibrate_module(module: nn.Module, calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> None:
    """Give the batch norms of a module in evaluation mode the statistics of some data, as `recalibrate` does; in place.

    Args:
        module: The module.
        calls: Inputs as (args, kwargs), without augmentation.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for args, kwargs in calls:
            module(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def norms_with_statistics(model: Model) -> list[Node]:
    """Return the nodes of the batch norms that have running statistics, in order of execution."""
    return [node for node in calls(model.graph) if op_name(node) == "batch_norm" and _keeps_statistics(node)]


def _keeps_statistics(node: Node) -> bool:
    return all(isinstance(source := get_argument(node, name), Node) and source.op == "get_attr" for name in STATISTICS)


def _reads_one_value(node: Node) -> bool:
    """Whether a batch norm reads one value a channel, whatever comes in: its batch is fixed to one sample then."""
    source = get_argument(node, "input")
    value = source.meta.get("val") if isinstance(source, Node) else None
    return isinstance(value, Tensor) and all(
        isinstance(size, int) and size == 1 for axis, size in enumerate(value.shape) if axis != 1
    )
