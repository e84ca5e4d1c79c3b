"""Brings a graph whose quantizers were trained into the form that post-training quantization gives it too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mil_cli.export.parity import without_quantizers
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, has_attribute, module_path, op_name, set_attribute
from mil_cli.ops import QUANTIZERS
from mil_cli.ops.offset import zero_point
from mil_cli.stages.quantize import positive
from mil_cli.stages.quantize.insert import replace_quantizer

_LAYERS = frozenset({"linear", *(f"conv{way}{axes}d" for way in ("", "_transpose") for axes in (1, 2, 3))})
_AFFINE = torch.ops.mil.quantize_affine.default


def settle(graph: GraphModule) -> None:
    """Put constants in place of what trained beside the weights, in place; the outputs stay the same.

    Scales become buffers; learned offsets become zero points; weights that were computed from parameters become
    parameters themselves.
    """
    read = read_attributes(graph)
    positive.settle(graph)
    for node in list(calls(graph)):
        if op_name(node) == "quantize_clipped":
            arguments = [get_argument(node, name) for name in ("x", "scale", "zero_point")]
            replace_quantizer(graph, node, _AFFINE, (*arguments, None, *_limits(node)))
        elif op_name(node) == "quantize_offset":
            _settle_offset(graph, node)
    _settle_weights(graph)
    forget(graph, read - read_attributes(graph))
    graph.graph.lint()
    graph.recompile()


def fold_weights(model: Model) -> Model:
    """Return a float model in evaluation mode with plain weights, batch norms folded into them.

    Weights that layers compute from parameters alone become parameters, of the values that they have: those of weight
    normalisation, of weight standardisation, of spectral norms. What is read elsewhere too stays as it is.

    Args:
        model: The model; not changed.
    """
    plain = model.clone().eval()
    graph = plain.graph
    read = read_attributes(graph)
    weights = {
        weight: f"{module_path(node)}.weight".removeprefix(".")
        for node in calls(graph)
        if op_name(node) in _LAYERS and _is_computed(graph, weight := get_argument(node, "weight"))
    }
    if weights:
        _put_in_place(graph, weights)
        forget(graph, read - read_attributes(graph))
        graph.graph.lint()
        graph.recompile()
    return fold_batch_norm(plain)


def _is_computed(graph: GraphModule, weight: object) -> bool:
    """Whether a weight is always the same and computed from parameters that nothing else reads."""
    if not isinstance(weight, Node) or weight.op != "call_function" or not only_attributes(weight):
        return False
    steps = _steps(weight)
    sources = [step for step in steps if _is_parameter(graph, step)]
    random = any(torch.Tag.nondeterministic_seeded in getattr(step.target, "tags", ()) for step in steps)
    return bool(sources) and not random and not _read_elsewhere(graph, sources, steps)


def strip(model: Model) -> Model:
    """Return a settled model without its quantizers and their attributes; one that has none as it is."""
    plain = without_quantizers(model)
    if plain is None:
        return model
    forget(plain.graph, read_attributes(model.graph) - read_attributes(plain.graph))
    return plain


def read_attributes(graph: GraphModule) -> set[str]:
    """Return the names of the attributes that some operator of a graph reads."""
    return {str(node.target) for node in graph.graph.find_nodes(op="get_attr") if node.users}


def forget(graph: GraphModule, names: Collection[str]) -> None:
    """Remove attributes that nobody reads any more, in place, with the submodules that held nothing else."""
    for node in graph.graph.find_nodes(op="get_attr"):
        if node.target in names:
            graph.graph.erase_node(node)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(owner), leaf)
        while owner and not graph.get_submodule(owner).state_dict():
            owner, _, leaf = owner.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
    graph.recompile()


def computed(graph: GraphModule, node: Node, known: Mapping[Node, Any] | None = None) -> Any:
    """Return the value of a node that nothing but attributes lead to, through torch's autograd.

    Args:
        graph: The graph.
        node: The node.
        known: Values of nodes on the way, in place of what would be computed.
    """
    values = dict(known or {})

    def value(step: Node) -> Any:
        if step not in values and step.op == "get_attr":
            values[step] = get_attribute(graph, str(step.target))
        elif step not in values:
            args, kwargs = map_arg((step.args, step.kwargs), value)
            values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return values[step]

    return value(node)


def only_attributes(node: Node) -> bool:
    """Whether nothing but attributes of the graph lead to a node."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return all(only_attributes(source) for source in node.all_input_nodes)


def _limits(node: Node) -> tuple[int, int]:
    return get_argument(node, "quant_min"), get_argument(node, "quant_max")


def _settle_offset(graph: GraphModule, node: Node) -> None:
    scale, offset = get_argument(node, "scale"), get_argument(node, "offset")
    step, start = (get_attribute(graph, str(source.target)).detach() for source in (scale, offset))
    quant_min, quant_max = _limits(node)
    name = f"{str(offset.target).removesuffix('.offset')}.zero_point"
    set_attribute(graph, name, zero_point(step, start, quant_min, quant_max))
    with graph.graph.inserting_before(node):
        zeros = graph.graph.get_attr(name)
    replace_quantizer(graph, node, _AFFINE, (get_argument(node, "x"), scale, zeros, None, quant_min, quant_max))


def _settle_weights(graph: GraphModule) -> None:
    """Put weights that are computed from parameters in the parameters' places."""
    rounded = dict.fromkeys(get_argument(node, "x") for node in calls(graph) if op_name(node) in QUANTIZERS)
    _put_in_place(graph, {node: None for node in rounded if node.op == "call_function" and only_attributes(node)})


def _put_in_place(graph: GraphModule, weights: Mapping[Node, str | None]) -> None:
    """Put the values of nodes that nothing but attributes lead to in the places of parameters that they come from.

    Args:
        graph: The graph.
        weights: By node the name of its parameter, which must not be another one's; None: that which it comes from.
    """
    steps = {weight: _steps(weight) for weight in weights}
    with torch.no_grad():
        values: dict[Node, Tensor] = {weight: computed(graph, weight) for weight in weights}
    sources = {weight: next(step for step in steps[weight] if _is_parameter(graph, step)) for weight in weights}
    shared = _read_elsewhere(graph, sources.values(), {step for weight in weights for step in steps[weight]})
    settled: dict[str, Tensor] = {}
    tied: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for weight, value in values.items():
        source, wanted = sources[weight], weights[weight]
        name = str(source.target) if wanted is None or has_attribute(graph, wanted) else wanted
        while (name in shared) or (name in settled and not torch.equal(settled[name], value)):
            name = f"{name}_rounded"
        if name not in settled:
            old: nn.Parameter = get_attribute(graph, str(source.target))
            _, new = tied.get(id(old), (old, None))
            if new is None or not torch.equal(new, value):  # else the names of one parameter stay those of one
                new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
            tied[id(old)] = old, new
            set_attribute(graph, name, new)
            settled[name] = value
        with graph.graph.inserting_before(weight):
            plain = graph.graph.get_attr(name)
        plain.meta = {**source.meta, **({"val": weight.meta["val"]} if "val" in weight.meta else {})}
        weight.replace_all_uses_with(plain)
        for step in steps[weight]:
            if not step.users:
                graph.graph.erase_node(step)


def _read_elsewhere(graph: GraphModule, sources: Iterable[Node], steps: Collection[Node]) -> set[str]:
    """Return the names of parameters that others than `steps` read, an embedding that shares one say."""
    names = {str(source.target): get_attribute(graph, str(source.target)) for source in sources}
    found: set[str] = set()
    for node in graph.graph.find_nodes(op="get_attr"):
        value = get_attribute(graph, str(node.target))
        if any(user not in steps for user in node.users):
            found.update(name for name, parameter in names.items() if parameter is value)
    return found


def _is_parameter(graph: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(get_attribute(graph, str(node.target)), nn.Parameter)


def _steps(node: Node) -> list[Node]:
    """Return a node and all that leads to it, each before what it reads."""
    steps: dict[Node, None] = {}
    pending = [node]
    while pending:
        step = pending.pop()
        steps.pop(step, None)
        steps[step] = None
        pending += step.all_input_nodes
    return list(steps)
