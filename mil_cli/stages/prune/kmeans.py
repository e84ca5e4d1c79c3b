"""Weight clustering: each weight becomes one of few values, and the file holds indices and a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import Node

from mil_cli.errors import StageError
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.nodes import calls, free_attribute, get_argument, get_attribute, op_name, set_attribute
from mil_cli.ops.codebook import lookup, nearest
from mil_cli.stages.prune.skipping import check_patterns, skipped
from mil_cli.stages.registry import StageConfig, stage

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_ITERATIONS = 30
_SPARSE = 0.1
_OWNER = "codebooks"


class KmeansConfig(StageConfig):
    """Settings of weight clustering.

    Attributes:
        clusters: Values that a weight may take, 2 to 256.
        channels_per_group: Output channels that share a codebook, where a layer's number of them divides by it; None:
            one codebook for the whole weight, which transposed convolutions always have.
        keep_zero: Whether 0 is one of the values, at which weights of 0 stay; ``auto``: where more than a tenth of the
            weight is 0. A later stage that trains the values moves it.
        smallest: Weights with fewer numbers stay as they are.
        skip: Layers to leave as they are: names of weights, or patterns with ``*``. The first convolution and depthwise
            ones always stay.
        train: Whether the values are trained.
        distill: Key of a train or distill stage of the recipe that they are trained by; None: the task's loss.
        trainer: Trainer settings for that, over that stage's own.
    """

    family: ClassVar[str] = "prune"
    method: ClassVar[str] = "kmeans"
    version: ClassVar[int] = 2
    never_after: ClassVar[dict[str, str]] = {"quantize": "weights are on a grid of their own already"}
    never_before: ClassVar[dict[str, str]] = {
        "prune": "a weight's values are shared by all of its channels",
        "nas": "a weight's values are shared by all of its channels",
        "quantize": "weights would leave the values that they were clustered to",
    }

    clusters: int = Field(16, ge=2, le=256)
    channels_per_group: int | None = Field(None, ge=1)
    keep_zero: Literal["auto"] | bool = "auto"
    smallest: int = Field(512, ge=0)
    skip: tuple[str, ...] = ()
    train: bool = True
    distill: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


@stage(KmeansConfig)
def kmeans(model: Model, config: KmeansConfig, context: Context) -> Model:
    """Cluster the weights of layers, train values and weights together, and keep indices and codebooks.

    Han et al. 2016, "Deep Compression" (ICLR): k-means from values spread evenly over the weight's range, which beats
    starts by density; batch norms are folded first, as folding would multiply the number of values. While training, a
    weight has the value that is nearest to it and moves by that value's gradient, so that it may go over to another.
    The file becomes smaller, and much smaller when it is zipped; inference takes as long as before.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, training and checkpoints.

    Returns:
        The model with its batch norms folded; clustered weights are read from codebooks, which can be trained further.

    Raises:
        StageError: No layer is left to cluster, a pattern of `skip` fits none, or there is no stage `distill` that
            trains.
    """
    clustered = fold_batch_norm(model)
    graph = clustered.graph
    weights = _weights(graph, config, where=f"stages.{context.name}")
    if not weights:
        raise StageError(
            "no layer of the model can be clustered",
            where=f"stages.{context.name}",
            hint="lower smallest, or skip less",
        )
    layers = {name: _insert(graph, name, nodes, config) for name, nodes in weights.items()}
    graph.graph.lint()
    graph.recompile()
    if config.train:
        clustered = context.finetune(
            clustered, stage=config.distill, name="values", trainer=config.trainer, before_step=_hold_zeros(layers)
        )
    for layer in layers.values():
        _settle(clustered.graph, layer)
    clustered.graph.graph.lint()
    clustered.graph.recompile()
    context.note(
        clusters=config.clusters,
        clustered_weights=sum(layer.numbers for layer in layers.values()),
        layers={name: {"groups": layer.groups, "relative_error": layer.error} for name, layer in layers.items()},
    )
    return clustered.eval()


@dataclass(frozen=True)
class _Clustered:
    """One clustered weight.

    Attributes:
        name: Of the weight.
        codebook: Name of its codebook.
        groups: Groups of output channels with values of their own.
        zeros: Which values are held at 0, bool ``[groups * clusters]``.
        numbers: How many weights it has.
        error: Root of the squared error of rounding to the values, over that of the weights, before training.
    """

    name: str
    codebook: str
    groups: int
    zeros: Tensor
    numbers: int
    error: float


def _hold_zeros(layers: Mapping[str, _Clustered]) -> StepHook:
    """Return what keeps, where 0 is a value, that value and the weights that are 0 as they are, by their gradients."""
    holding = [layer for layer in layers.values() if bool(layer.zeros.any())]

    def before_step(training: Model, steps: int, total: int) -> None:
        for layer in holding:
            codebook, weight = (get_attribute(training.graph, name) for name in (layer.codebook, layer.name))
            if codebook.grad is not None:
                codebook.grad.masked_fill_(layer.zeros.to(codebook.device), 0.0)
            if weight.grad is not None:
                weight.grad.masked_fill_(weight.detach() == 0, 0.0)

    return before_step


def cluster_values(rows: Tensor, clusters: int, *, zero: bool) -> Tensor:
    """Return the values that k-means finds for each row, sorted.

    Args:
        rows: ``[groups, weights]``.
        clusters: Values of each group.
        zero: Whether one of them is held at 0.

    Returns:
        ``[groups, clusters]``.
    """
    rows, groups = rows.detach().double(), len(rows)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    values = low + (high - low) * torch.linspace(0, 1, clusters, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        if zero:
            values.scatter_(1, values.abs().argmin(1, keepdim=True), 0.0)
        places = nearest(rows, values, groups)
        sums = torch.zeros_like(values).scatter_add_(1, places, rows)
        counts = torch.zeros_like(values).scatter_add_(1, places, torch.ones_like(rows))
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), values)
        _fill_empty(moved, counts, rows, (rows - values.gather(1, places)).abs())
        if torch.equal(moved, values):
            break
        values = moved
    if zero:
        values.scatter_(1, values.abs().argmin(1, keepdim=True), 0.0)
    return values.sort(1).values


def _fill_empty(values: Tensor, counts: Tensor, rows: Tensor, errors: Tensor) -> None:
    """Move values that no weight is nearest to onto the weights that are worst off, in place."""
    for group in (counts == 0).any(1).nonzero().flatten().tolist():
        empty = (counts[group] == 0).nonzero().flatten()
        worst = errors[group].topk(min(len(empty), errors.shape[1])).indices
        values[group, empty[: len(worst)]] = rows[group, worst]


def _weights(graph: GraphModule, config: KmeansConfig, *, where: str) -> dict[str, list[Node]]:
    """Return by name the weights to cluster, with the nodes that read the attribute.

    Raises:
        StageError: A pattern of `skip` fits none.
    """
    first = next((node for node in calls(graph) if op_name(node).startswith("conv")), None)
    found: dict[str, list[Node]] = {}
    left: set[str] = set()
    names: list[str] = []
    for node in calls(graph):
        if op_name(node) not in _LAYERS:
            continue
        source = get_argument(node, "weight")
        if source.op != "get_attr":
            continue
        name, weight = str(source.target), get_attribute(graph, str(source.target))
        names.append(name)
        depthwise = op_name(node).startswith("conv") and weight.shape[1] == 1 and get_argument(node, "groups") > 1
        if node is first or depthwise or skipped(name, config.skip) or weight.numel() < config.smallest:
            left.add(name)
        readers = [node for node in graph.graph.find_nodes(op="get_attr") if _value(graph, node) is weight]
        first_name = str(readers[0].target)  # a shared weight may have several
        left.update({first_name} if name in left else ())
        found[first_name] = readers
    check_patterns(config.skip, names, where=where)
    return {name: nodes for name, nodes in found.items() if name not in left}


def _value(graph: GraphModule, node: Node) -> Any:
    return get_attribute(graph, str(node.target))


def _insert(graph: GraphModule, name: str, nodes: Sequence[Node], config: KmeansConfig) -> _Clustered:
    """Let readers of a weight read the nearest values, in place."""
    weight: Tensor = get_attribute(graph, name).detach()
    # A transposed weight has its output channels on the second axis.
    turned = any(op_name(user).startswith("conv_transpose") for node in nodes for user in node.users)
    per_group = None if turned else config.channels_per_group
    groups = len(weight) // per_group if per_group is not None and len(weight) % per_group == 0 else 1
    rows = weight.reshape(groups, -1)
    zero = float((rows == 0).double().mean()) > _SPARSE if config.keep_zero == "auto" else config.keep_zero
    values = cluster_values(rows, config.clusters, zero=zero).to(weight.dtype).reshape(-1)
    path = free_attribute(graph, f"{_OWNER}.{name.replace('.', '_')}")
    set_attribute(graph, path, nn.Parameter(values))
    for node in nodes:
        with graph.graph.inserting_after(node):
            codebook = graph.graph.get_attr(path)
        codebook.meta = {"val": values}
        with graph.graph.inserting_after(codebook):
            chosen = graph.graph.call_function(torch.ops.mil.cluster.default, (node, codebook, groups))
        chosen.meta = dict(node.meta)
        for user in [user for user in node.users if user is not chosen]:
            user.replace_input_with(node, chosen)
    rounded = lookup(values, nearest(weight, values, groups).to(torch.uint8), groups)
    error = math.sqrt(float((rounded - weight).square().sum()) / max(float(weight.square().sum()), 1e-30))
    zeros = (values == 0) if zero else torch.zeros_like(values, dtype=torch.bool)
    return _Clustered(name, path, groups, zeros, weight.numel(), error)


def _settle(graph: GraphModule, layer: _Clustered) -> None:
    """Let readers of a clustered weight read the codebook by constant indices, in place; the weight itself goes."""
    original = get_attribute(graph, layer.name)
    values = get_attribute(graph, layer.codebook).detach()
    places = nearest(original.detach(), values, layer.groups).to(torch.uint8)
    path = f"{layer.codebook}_indices"
    set_attribute(graph, path, places)
    for node in list(calls(graph)):
        source = get_argument(node, "weight") if op_name(node) == "cluster" else None
        if not isinstance(source, Node) or _value(graph, source) is not original:
            continue
        codebook = get_argument(node, "codebook")
        with graph.graph.inserting_before(node):
            indices = graph.graph.get_attr(path)
            indices.meta = {"val": places}
            read = graph.graph.call_function(torch.ops.mil.lookup.default, (codebook, indices, layer.groups))
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.graph.erase_node(node)
        if not source.users:
            graph.graph.erase_node(source)
    for name in [name for name, value in graph.named_parameters(remove_duplicate=False) if value is original]:
        owner, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(owner), leaf)
