"""Finds what training mode has and an evaluation capture loses; restores dropout, reports the rest.

The module is captured a second time in training mode and the two graphs are aligned. Dropout that evaluation leaves
out (inside attention) is put back as arguments or nodes that the mode switch drives; layers that their owner keeps
frozen stay so. Stochastic depth, noise and auxiliary heads have no counterpart in the evaluation graph: they are
reported with the module they belong to.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from difflib import SequenceMatcher

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from mil_cli.graph.failure import summary
from mil_cli.graph.mode import FLAGS, record_mode
from mil_cli.graph.nodes import (
    calls,
    get_argument,
    get_attribute,
    module_path,
    module_stack,
    namespace,
    op_name,
)
from mil_cli.graph.program import to_graph, trace
from mil_cli.graph.samples import Call

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_RANDOM = frozenset({"bernoulli", "rand", "rand_like", "randn", "randn_like", "uniform", "normal", "multinomial"})
_BOOKKEEPING = frozenset({"sym_size", "getitem", "_assert_scalar", "_assert_tensor_metadata", "detach", "new_empty"})
_MOMENTUM = 0.1
_SHOWN = 5

_Pair = tuple[Node, Node]


def restore_training(
    graph: GraphModule, module: nn.Module, samples: Call, axes: Sequence[Collection[int]]
) -> list[str]:
    """Give a graph captured in evaluation what training mode has; return notices of what could not be restored.

    Args:
        graph: The evaluation graph; its nodes' annotations change, and dropout nodes may be added.
        module: The user's module; it is copied, not changed. Where it is in training mode, layers that its owner keeps
            in evaluation stay frozen.
        samples: The example call.
        axes: The dynamic axes of each input tensor.
    """
    notices: list[str] = []
    try:
        trained = _training_copy(module, notices)
        reference, _ = to_graph(trace(trained, samples, axes, source_lines=False))
    except Exception as error:
        return [
            f"training mode cannot be captured ({summary(error)}): dropout inside attention and random depth, if the "
            "model has them, are not in the captured model",
            *_unused_parameters(graph),
        ]
    pairs, extra = _align(graph, reference)
    for evaluation, training in pairs:
        _record_differences(evaluation, training)
    extra = _insert_dropouts(graph.graph, {train: node for node, train in pairs}, extra)
    graph.graph.lint()
    graph.recompile()
    outputs = len(graph.graph.output_node().all_input_nodes), len(reference.graph.output_node().all_input_nodes)
    return [*notices, *_describe(extra, outputs), *_unused_parameters(graph)]


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a user's module, also where it keeps computed tensors (as old weight norms do)."""
    computed = [
        value
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})


def _training_copy(module: nn.Module, notices: list[str]) -> nn.Module:
    """Return a copy in training mode whose batch norms have a momentum the capture can follow."""
    copied = copy_module(module).cpu()
    kept = {name for name, child in module.named_modules() if module.training and not child.training}
    copied.train()
    for name, child in copied.named_modules():
        child.training = child.training and name not in kept
    for name, child in copied.named_modules():
        if isinstance(child, _BatchNorm) and child.momentum is None and child.track_running_stats:
            child.momentum = _MOMENTUM
            notices.append(
                f"{name}: a cumulative average of batch statistics cannot be captured; the captured model trains with "
                f"momentum {_MOMENTUM}"
            )
    return copied


def _key(node: Node) -> tuple[str, str]:
    return module_path(node), op_name(node).rstrip("_")


def _align(graph: GraphModule, reference: GraphModule) -> tuple[list[_Pair], list[Node]]:
    """Pair the calls of both graphs in order; return the pairs and the calls that only training makes."""
    ours, theirs = list(calls(graph)), list(calls(reference))
    matcher = SequenceMatcher(None, [_key(node) for node in ours], [_key(node) for node in theirs], autojunk=False)
    pairs: list[_Pair] = []
    extra: list[Node] = []
    for tag, start, stop, other_start, other_stop in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(ours[start:stop], theirs[other_start:other_stop], strict=True)
        else:
            extra += theirs[other_start:other_stop]
    return pairs, extra


def _record_differences(evaluation: Node, training: Node) -> None:
    """Note every flag or probability that differs between the modes, and every flag that its owner keeps off."""
    if not isinstance(evaluation.target, torch._ops.OpOverload) or evaluation.target is not training.target:
        return
    for argument in evaluation.target._schema.arguments:
        name = argument.name
        ours, theirs = get_argument(evaluation, name), get_argument(training, name)
        if not isinstance(ours, bool | float) or not isinstance(theirs, bool | float):
            continue
        frozen = name in FLAGS and ours is False and theirs is False
        if frozen or (ours != theirs and name not in FLAGS):
            record_mode(evaluation, name, evaluation=ours, training=theirs)


def _insert_dropouts(graph: Graph, counterpart: dict[Node, Node], extra: Sequence[Node]) -> list[Node]:
    """Put dropout nodes that only training has into the evaluation graph, switched off; return what is left."""
    left = []
    for node in extra:
        name = op_name(node).rstrip("_")
        source = node.args[0] if node.args else None
        if (
            namespace(node) != "aten"
            or name not in _DROPOUTS
            or not isinstance(source, Node)
            or source not in counterpart
            or set(source.users) != {node}
        ):
            left.append(node)
            continue
        before = counterpart[source]
        target: Callable[..., object] = getattr(torch.ops.aten, name).default
        with graph.inserting_after(before):
            inserted = graph.call_function(target, (before, get_argument(node, "p"), False))
        inserted.meta = {key: before.meta[key] for key in ("val", "tensor_meta", "stack_trace") if key in before.meta}
        if "nn_module_stack" in node.meta:
            inserted.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        for user in list(before.users):
            if user is not inserted:
                user.replace_input_with(before, inserted)
        counterpart[node] = inserted
    return left


def _describe(extra: Sequence[Node], outputs: tuple[int, int]) -> list[str]:
    """Say by module what training does and the captured model will not."""
    by_module: dict[str, list[Node]] = defaultdict(list)
    for node in extra:
        if not _is_bookkeeping(node):
            by_module[module_path(node)].append(node)
    random = {path for path, nodes in by_module.items() if any(op_name(n).rstrip("_") in _RANDOM for n in nodes)}
    notices = []
    if random:
        kinds = sorted({module_stack(by_module[path][0])[-1][1].rpartition(".")[2] for path in random})
        notices.append(
            f"random depth or noise in {_list(random)} ({', '.join(kinds)}) acts only in training and is not in the "
            "captured model, which trains without it"
        )
    if other := set(by_module) - random:
        notices.append(
            f"{_list(other)} does more in training than in evaluation "
            f"({_list({op_name(node) for path in other for node in by_module[path]})}); the captured model does not"
        )
    if outputs[0] != outputs[1]:
        notices.append(
            f"the model gives {outputs[1]} tensors in training and {outputs[0]} in evaluation: auxiliary outputs are "
            "not in the captured model"
        )
    return notices


def _is_bookkeeping(node: Node) -> bool:
    """Whether a call only computes sizes or counts batches."""
    name = op_name(node).rstrip("_")
    if not isinstance(node.target, torch._ops.OpOverload) or name in _BOOKKEEPING:
        return True
    counts = node.args[0] if node.args else None
    return name == "add" and isinstance(counts, Node) and str(counts.target).endswith("num_batches_tracked")


def _unused_parameters(graph: GraphModule) -> list[str]:
    """Report parameters that evaluation never reads."""
    unused: set[tuple[str, int]] = set()
    used: set[tuple[str, int]] = set()
    for node in graph.graph.find_nodes(op="get_attr"):
        value = get_attribute(graph, str(node.target))
        if isinstance(value, nn.Parameter):
            (used if node.users else unused).add((str(node.target), id(value)))
    tied = {identity for _, identity in used}
    names = {name for name, identity in unused if identity not in tied}
    return [f"parameters that evaluation does not use: {_list(names)}"] if names else []


def _list(names: Collection[str]) -> str:
    """Join names, the first few of many; the root module is called by its role."""
    shown = sorted(name or "the model's own forward" for name in names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
