"""Makes a Model of an exported program that came without a sidecar: its specification and samples are inferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from mil_cli.errors import ArchiveError
from mil_cli.graph.describe import dtype_name, output_specs
from mil_cli.graph.mode import FLAGS, record_mode, set_mode
from mil_cli.graph.model import Model, mark_transient
from mil_cli.graph.nodes import calls, get_argument, op_name, schema_index
from mil_cli.graph.program import set_out_spec, symbolic_shape, to_graph
from mil_cli.graph.spec import BATCH, ModelSpec, TensorSpec
from mil_cli.graph.tree import portable_spec, runtime_spec

_BATCH_SIZE = 5
_OTHER_SIZE = 16
_SEED = 0


def infer_model(program: ExportedProgram, *, where: str) -> Model:
    """Return a Model of a program that is known to be safe.

    Names come from the program, the first input's dynamic first axis is taken as the batch, samples are random (ones
    and zeros where they are not floating-point).

    Raises:
        ArchiveError: If the program takes numbers that are not constant, or does not run.
    """
    sizes = _sizes(program)
    symbols: dict[str, str] = {}
    generator = torch.Generator().manual_seed(_SEED)
    leaves: list[Any] = []
    inputs: list[TensorSpec] = []
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            leaves.append(spec.arg.value)
            continue
        value = values.get(spec.arg.name)
        if not isinstance(spec.arg, TensorArgument) or not isinstance(value, Tensor):
            raise ArchiveError("the model takes inputs that are not tensors", where=where, value=spec.arg.name)
        shape = tuple(_concrete(size, sizes) for size in symbolic_shape(value))
        dynamic = {
            axis: _label(size, axis, symbols)
            for axis, size in enumerate(symbolic_shape(value))
            if isinstance(size, SymInt)
        }
        leaves.append(_sample(shape, value.dtype, generator))
        inputs.append(TensorSpec(spec.arg.name, shape, dtype_name(value), dynamic))
    graph, transient = to_graph(program)
    mark_transient(graph, transient)
    notices = ["the archive has no sidecar: names, dynamic dimensions and samples are inferred"]
    notices += _leave_training(graph)
    in_tree = program.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(leaves, in_tree)
    try:
        with torch.no_grad():
            outputs = graph(*args, **kwargs)
    except Exception as error:
        raise ArchiveError(f"the model does not run on inputs of its own shapes ({error})", where=where) from None
    out_tree = portable_spec(outputs)
    set_out_spec(graph, runtime_spec(out_tree))
    output, constants = output_specs(program, outputs, out_tree, symbols, None)
    return Model(
        graph=graph,
        spec=ModelSpec(
            inputs=tuple(inputs),
            outputs=tuple(output),
            in_tree=pytree.treespec_dumps(in_tree),
            out_tree=pytree.treespec_dumps(out_tree),
            out_constants=constants,
            source=where,
            notices=tuple(notices),
        ),
        samples=(tuple(args), dict(kwargs)),
    )


def _sizes(program: ExportedProgram) -> dict[Any, int]:
    """Choose a size for every symbol: within its range, the batch's or the other usual one."""
    first = next(
        (size.node.expr for value in _tensors(program) for size in _first_size(value) if isinstance(size, SymInt)), None
    )
    sizes = {}
    for symbol, bounds in program.range_constraints.items():
        lower, upper = int(max(bounds.lower, 1)), bounds.upper
        wanted = max(_BATCH_SIZE if symbol == first else _OTHER_SIZE, lower)
        sizes[symbol] = wanted if wanted <= upper else int(upper)
    return sizes


def _tensors(program: ExportedProgram) -> list[Tensor]:
    names = set(program.graph_signature.user_inputs)
    nodes = program.graph.find_nodes(op="placeholder")
    return [node.meta["val"] for node in nodes if node.name in names and isinstance(node.meta.get("val"), Tensor)]


def _first_size(value: Tensor) -> tuple[Any, ...]:
    return symbolic_shape(value)[:1]


def _concrete(size: int | SymInt, sizes: Mapping[Any, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, SymInt) else size


def _label(size: object, axis: int, symbols: dict[str, str]) -> str:
    """Name a dynamic size: the first one on a first axis is the batch, the others count on."""
    name = BATCH if axis == 0 and BATCH not in symbols.values() else f"dim_{len(symbols)}"
    return symbols.setdefault(str(size), name)


def _sample(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)


def _leave_training(graph: GraphModule) -> list[str]:
    """Switch a graph that was exported in training mode to evaluation."""
    found = False
    for node in calls(graph):
        flag = next((name for name in FLAGS if schema_index(node, name) is not None), None)
        if flag is None or get_argument(node, flag) is not True or not _has_two_modes(node):
            continue
        record_mode(node, flag, evaluation=False, training=True)
        found = True
    set_mode(graph, False)
    return ["the archive was exported in training mode and was switched to evaluation"] if found else []


def _has_two_modes(node: Any) -> bool:
    """Whether a layer that trains has an evaluation form: dropout, recurrence, and norms with running statistics."""
    if schema_index(node, "running_mean") is None:
        return True
    return get_argument(node, "running_mean") is not None and op_name(node) != "instance_norm"
