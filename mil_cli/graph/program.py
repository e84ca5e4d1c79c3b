"""Runs `torch.export` the way a Model needs it, and turns exported programs into graph modules."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.fx import config as fx_config
from torch.utils import _pytree as pytree

from mil_cli.graph.branches import COND, inline_branches, restore_branches
from mil_cli.graph.nodes import calls, get_attribute, op_name, set_attribute
from mil_cli.graph.regions import inline_regions
from mil_cli.graph.tree import plain_spec

if TYPE_CHECKING:
    from mil_cli.graph.model import Model


@contextmanager
def capture_settings() -> Iterator[None]:
    """Set what a capture needs and put it back: no fused attention fast path, gradients on, no warnings of torch's.

    The fast path would hide attention in one opaque operator. torch's loggers are silenced: what goes wrong is raised.
    """
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    noisy = [logger for logger in known if logger.name.startswith("torch") and not logger.disabled]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in noisy:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for logger in noisy:
            logger.disabled = False


@contextmanager
def _recording(source_lines: bool) -> Iterator[None]:
    """Have torch record the stack at each node only where that is wanted."""
    kept = fx_config.do_not_emit_stack_traces
    fx_config.do_not_emit_stack_traces = not source_lines
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = kept


def trace(
    module: nn.Module,
    samples: tuple[tuple[Any, ...], dict[str, Any]],
    axes: Sequence[Collection[int]],
    *,
    source_lines: bool = True,
) -> ExportedProgram:
    """Export a module in its present mode.

    Args:
        module: The module.
        samples: ``(args, kwargs)``; no tensor object may occur twice.
        axes: For each tensor among the samples' leaves, the axes that may be dynamic; the exporter makes those static
            that have to be.
        source_lines: Whether nodes shall know the user's lines that made them, which costs a tenth of the time.
    """
    args, kwargs = samples
    tensors = [leaf for leaf in pytree.tree_leaves(samples) if isinstance(leaf, Tensor)]
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, wanted in zip(tensors, axes, strict=True):
        if wanted:
            shapes[tensor] = {axis: Dim.AUTO for axis in wanted}
    dynamic = None
    if any(axes):
        dynamic = shapes.dynamic_shapes(module, args, kwargs)  # type: ignore[no-untyped-call]
    # On failure torch prints the half-made graph.
    with capture_settings(), _recording(source_lines), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)


def input_shapes(program: ExportedProgram) -> list[tuple[int | SymInt, ...]]:
    """Return the symbolic shape of each tensor among the user inputs: integers, or expressions where dynamic."""
    names = set(program.graph_signature.user_inputs)
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
    return [symbolic_shape(value) for value in values if isinstance(value, Tensor)]


def symbolic_shape(value: Tensor) -> tuple[int | SymInt, ...]:
    """Return a traced tensor's shape, with an integer for every size that the exporter found to be constant."""
    return tuple(
        int(size) if isinstance(size, SymInt) and size.node.expr.is_number else size for size in tuple(value.shape)
    )


def to_graph(program: ExportedProgram) -> tuple[GraphModule, list[str]]:
    """Return the callable graph module of a program, and the names of its tensors that the state dict leaves out.

    Constants become buffers, so that they move between devices with the rest.
    """
    with capture_settings():
        graph = program.module(check_guards=False)
    if not isinstance(graph, GraphModule):
        raise TypeError(f"an exported program gave a {type(graph).__name__}")
    transient = [
        spec.target
        for spec in program.graph_signature.input_specs
        if spec.target is not None
        and (spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and spec.persistent is False))
    ]
    for name in transient:
        value = get_attribute(graph, name)
        if isinstance(value, Tensor):
            set_attribute(graph, name, value.detach(), persistent=False)
    # The exporter's check of input shapes would not survive a copy, and costs time at every step.
    graph._forward_pre_hooks.clear()
    graph._forward_pre_hooks_with_kwargs.clear()
    inline_regions(graph)
    transient.extend(_hand_constants_to_branches(graph))
    _drop_type_checks(graph)
    _drop_unread_calls(graph)
    _forget_history(graph)
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {_short_key(key): value for key, value in stack.items()}
    return graph, transient


def _hand_constants_to_branches(graph: GraphModule) -> list[str]:
    """Let the graph hold the constants of branches, as it does their weights, and return the names that they got.

    An archive could not keep them otherwise. Besides, a branch is then handed what it reads in one order, whatever the
    exporter's.
    """
    if not graph.graph.find_nodes(op="call_function", target=COND):
        return []
    before = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    inline_branches(graph)
    restore_branches(graph)
    graph.recompile()
    added = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")} - before
    return sorted(name for name in added if isinstance(get_attribute(graph, name), Tensor))


def export_model(model: Model) -> ExportedProgram:
    """Export a model's graph again, in evaluation mode; records in its outputs become plain dicts and tuples."""
    clone = model.clone().eval()
    clone.graph.cpu()
    set_out_spec(clone.graph, plain_spec(pytree.treespec_loads(model.spec.out_tree)))
    # The bound methods are instance attributes that the exporter would take for state.
    for name in ("train", "eval"):
        clone.graph.__dict__.pop(name, None)
    program = trace(clone.graph, clone.samples, [tuple(tensor.dynamic) for tensor in model.spec.inputs])
    _forget_history(program.graph_module)
    return program


def set_out_spec(graph: GraphModule, spec: pytree.TreeSpec) -> None:
    """Change the tree that a graph module's outputs are put into; the leaves stay as they are."""
    codegen: Any = graph.graph._codegen
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    graph.recompile()


def _drop_type_checks(graph: GraphModule) -> None:
    """Drop the checks that the exporter puts before every conversion: they would fail on another device."""
    for node in list(graph.graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":
            graph.graph.erase_node(node)


def _drop_unread_calls(graph: GraphModule) -> None:
    """Drop what the user's code computes and does not use: it would be run, counted and exported with the rest."""
    for node in reversed(list(calls(graph))):
        if not node.users and not node.is_impure():
            graph.graph.erase_node(node)
    graph.recompile()


def _forget_history(graph: GraphModule) -> None:
    """Drop the list of earlier graphs on each node: it grows with every export and holds addresses of this process."""
    for node in graph.graph.nodes:
        node.meta.pop("from_node", None)


def _short_key(key: str) -> str:
    """Every export prefixes the keys of the module stack once more; keep one prefix."""
    prefix = "L__self__"
    while key.startswith(prefix + prefix):
        key = key[len(prefix) :]
    return key
