"""Captures a user's module as a Model: torch.export in evaluation mode, dynamic dimensions, names of any tree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mil_cli.errors import CaptureError, did_you_mean
from mil_cli.graph.describe import dtype_name, output_specs, unique_names
from mil_cli.graph.failure import capture_error, summary
from mil_cli.graph.mode import set_mode
from mil_cli.graph.model import Model, mark_transient
from mil_cli.graph.nodes import calls, namespace, op_name, source_line
from mil_cli.graph.program import capture_settings, input_shapes, set_out_spec, to_graph, trace
from mil_cli.graph.restore import copy_module, restore_training
from mil_cli.graph.safety import NAMESPACES
from mil_cli.graph.samples import Call, resize_axis
from mil_cli.graph.spec import BATCH, ModelSpec, TensorSpec
from mil_cli.graph.tree import leaf_names, portable_spec, register_dataclasses, runtime_spec

_SAMPLE_BATCH = 5
"""Samples kept: small, not 0 or 1 (which the exporter specialises), and rarely the size of another axis."""
_OTHER_BATCH = 3


@dataclass(frozen=True)
class _Inputs:
    """Example inputs on their way into a capture: the call, the tensors' names and wanted dynamic axes."""

    call: Call
    names: list[str]
    axes: list[dict[int, str]]


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    source: str = "",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Model:
    """Capture a module as a Model in evaluation mode; the module itself is not changed.

    Args:
        module: The user's module, in any mode.
        args: Example positional inputs: any pytree of tensors and plain constants.
        kwargs: Example named inputs.
        dynamic: For each input name its dynamic axes and their names; the axis named ``batch`` counts samples. None:
            axis 0 of every input that shares the first input's size there is taken as the batch, if the model runs
            with two batch sizes. An empty mapping: all sizes are fixed.
        source: Where the model came from, in words.
        input_names: Names for the input tensors, in the order of the leaves; by default forward's own.
        output_names: Names for the output tensors; by default keys, fields or ``output_0``, ...

    Returns:
        The model, with samples of a small batch.

    Raises:
        CaptureError: If the module does not run on its inputs or cannot be captured; names the user's line.
    """
    _check_names(module)
    owned = _owned_copy(module)
    buffers = {name: _Buffer(value) for name, value in owned.named_buffers() if not is_lazy(value)}
    notices: list[str] = []
    call = _clean_call(args, kwargs or {})
    names = _input_names(module, call, input_names)
    with capture_settings(), torch.no_grad():
        outputs = _run(owned, call, "the model fails on its example inputs")
        infer = dynamic is None
        axes = _infer_batch(owned, call, names, notices) if infer else _declared_axes(dynamic or {}, call, names)
        inputs = _Inputs(_shrink(owned, call, axes), names, axes)
        outputs = _run(owned, inputs.call, "the model fails on its example inputs")
        _put_back(owned, buffers)
    program, inputs = _trace_with_fallback(owned, inputs, notices)
    graph, transient = to_graph(program)
    input_specs, symbols = _input_specs(program, inputs, notices)
    out_tree = portable_spec(outputs)
    set_out_spec(graph, runtime_spec(out_tree))
    outputs_found, constants = output_specs(program, outputs, out_tree, symbols, output_names)
    mark_transient(graph, transient)
    model = Model(
        graph=graph,
        spec=ModelSpec(
            inputs=tuple(input_specs),
            outputs=tuple(outputs_found),
            in_tree=pytree.treespec_dumps(pytree.tree_structure(inputs.call)),
            out_tree=pytree.treespec_dumps(out_tree),
            out_constants=constants,
            source=source,
        ),
        samples=inputs.call,
    )
    set_mode(model.graph, False)
    _check_operators(model)
    notices += restore_training(model.graph, module, model.samples, [tuple(tensor.dynamic) for tensor in input_specs])
    model.spec = model.spec.with_(notices=tuple(notices))
    return model


def _owned_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the module on the CPU in evaluation mode."""
    try:
        owned = copy_module(module)
    except Exception as error:
        raise capture_error(
            error, "the model cannot be copied", hint="keep no tensors with a gradient history on the module"
        ) from None
    return owned.cpu().eval()


class _Buffer:
    """What a buffer holds before a run."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._version, self._kept = value, value._version, value.clone()

    def put_back(self, value: Tensor) -> None:
        """Give the buffer, which may be another tensor since, what it held, if a run has written into it."""
        written = value is not self._value or value._version != self._version
        if written and value.shape == self._kept.shape:
            value.copy_(self._kept)


def _put_back(module: nn.Module, buffers: Mapping[str, _Buffer]) -> None:
    """Give counters, caches and other buffers the values that they had before the runs of the capture."""
    for name, value in module.named_buffers():
        if name in buffers:
            buffers[name].put_back(value)


def _clean_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Copy the example inputs: CPU tensors without history, each object its own."""
    register_dataclasses((tuple(args), dict(kwargs)))

    def clean(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        raise CaptureError(
            f"inputs are tensors and plain constants in tuples, lists and dicts, not {type(leaf).__name__}",
            value=leaf,
            hint="have the task give the model tensors",
        )

    cleaned = pytree.tree_map(clean, (tuple(args), dict(kwargs)))
    return cleaned[0], cleaned[1]


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def _input_names(module: nn.Module, call: Call, given: Sequence[str] | None) -> list[str]:
    """Name each input tensor by forward's signature and the keys below it."""
    args, kwargs = call
    tops: list[str] = []
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    for index in range(len(args)):
        inside = index < len(positional)
        tops.append(positional[index].name if inside else f"{variadic}_{index - len(positional)}")
    tops += list(kwargs)
    names = []
    for top, value in zip(tops, [*args, *kwargs.values()], strict=True):
        below = leaf_names(portable_spec(value), alone=top, prefix="")
        leaves = pytree.tree_leaves(value)
        for name, leaf in zip(below, leaves, strict=True):
            if isinstance(leaf, Tensor):
                names.append(name if name == top or name.startswith(f"{top}_") else f"{top}.{name}")
    return unique_names(names, given, "input")


def _run(module: nn.Module, call: Call, what: str) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, call)
    try:
        outputs = module(*args, **kwargs)
    except Exception as error:
        raise capture_error(error, what) from None
    register_dataclasses(outputs)
    return outputs


def _resized(call: Call, axes: Sequence[Mapping[int, str]], size: int) -> Call:
    """Return the call with every axis named as the batch at another size."""
    leaves, tree = pytree.tree_flatten(call)
    remaining = iter(axes)
    resized = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            batch_axes = [axis for axis, name in next(remaining).items() if name == BATCH]
            for axis in batch_axes:
                leaf = resize_axis(leaf, axis, size)
        resized.append(leaf)
    args, kwargs = pytree.tree_unflatten(resized, tree)
    return tuple(args), dict(kwargs)


def _infer_batch(module: nn.Module, call: Call, names: Sequence[str], notices: list[str]) -> list[dict[int, str]]:
    """Take axis 0 as the batch where inputs share the first one's size, if the model runs with another size."""
    tensors = _tensors(call)
    size = next((tensor.shape[0] for tensor in tensors if tensor.ndim), None)
    if not size:
        return [{} for _ in tensors]
    axes = [{0: BATCH} if tensor.ndim and tensor.shape[0] == size else {} for tensor in tensors]
    other = _OTHER_BATCH if size != _OTHER_BATCH else _SAMPLE_BATCH
    try:
        args, kwargs = _resized(call, axes, other)
        module(*args, **kwargs)
    except Exception as error:
        shared = [name for name, wanted in zip(names, axes, strict=True) if wanted]
        notices.append(
            f"the batch size is fixed to {size}: with {other} along axis 0 of {', '.join(shared)} the model fails "
            f"({summary(error)})"
        )
        return [{} for _ in tensors]
    return axes


def _declared_axes(dynamic: Mapping[str, Mapping[int, str]], call: Call, names: Sequence[str]) -> list[dict[int, str]]:
    """Check the declared dynamic axes against the inputs; return them for each tensor."""
    for name in dynamic:
        if name not in names:
            raise CaptureError(
                "there is no input of this name", where="dynamic", value=name, hint=did_you_mean(name, names)
            )
    axes = []
    for name, tensor in zip(names, _tensors(call), strict=True):
        wanted: dict[int, str] = {}
        for axis, label in dynamic.get(name, {}).items():
            number = int(axis)
            if not -tensor.ndim <= number < tensor.ndim:
                raise CaptureError(f"input {name} has {tensor.ndim} axes", where=f"dynamic.{name}", value=axis)
            wanted[number % tensor.ndim] = str(label)
        axes.append(dict(sorted(wanted.items())))
    return axes


def _shrink(module: nn.Module, call: Call, axes: Sequence[Mapping[int, str]]) -> Call:
    """Bring the batch to the size that samples have."""
    if not any(BATCH in wanted.values() for wanted in axes):
        return call
    return _resized(call, axes, _SAMPLE_BATCH)


def _trace_with_fallback(module: nn.Module, inputs: _Inputs, notices: list[str]) -> tuple[ExportedProgram, _Inputs]:
    """Capture with all wanted dynamic axes, else with the batch only, else with fixed sizes."""
    wanted = inputs.axes
    batch_only = [{axis: name for axis, name in axes.items() if name == BATCH} for axes in wanted]
    attempts: list[list[dict[int, str]]] = [wanted, batch_only, [{} for _ in wanted]]
    failure: Exception | None = None
    for number, axes in enumerate(attempts):
        if number and axes == attempts[number - 1]:
            continue
        try:
            program = trace(module, inputs.call, [tuple(each) for each in axes])
        except Exception as error:
            failure = failure or error
            last = error
            continue
        if failure is not None:
            kept = "only the batch is dynamic" if any(axes) else "all sizes are fixed"
            notices.append(
                f"with the wanted dynamic dimensions the model cannot be captured, so {kept} ({summary(failure)})"
            )
        return program, _Inputs(inputs.call, inputs.names, axes)
    raise capture_error(last, "the model cannot be captured") from None


def _check_names(module: nn.Module) -> None:
    """Refuse parts whose name is one of a graph module's own: torch's exporter loses them."""
    parts = [*module._modules, *module._parameters, *module._buffers]
    taken = next((name for name in parts if name == "meta" or hasattr(GraphModule, name)), None)
    if taken is not None:
        raise CaptureError(
            f"the model has a part called '{taken}', which is a name that captured graphs use themselves",
            hint="call this attribute of the model something else",
        )


def _check_operators(model: Model) -> None:
    """Refuse operators that no archive of ours may hold and no exporter knows."""
    for node in calls(model.graph):
        if (space := namespace(node)) and space not in NAMESPACES:
            raise CaptureError(
                f"the operator {space}::{op_name(node)} is not one of torch's own",
                where=source_line(node),
                hint="write this step with torch operators: no other tool knows this one",
            )


def _input_specs(
    program: ExportedProgram, inputs: _Inputs, notices: list[str]
) -> tuple[list[TensorSpec], dict[str, str]]:
    """Read from the program which wanted axes stayed dynamic; return the specs and the name of each symbol."""
    specs: list[TensorSpec] = []
    symbols: dict[str, str] = {}
    for name, tensor, shape, wanted in zip(
        inputs.names, _tensors(inputs.call), input_shapes(program), inputs.axes, strict=True
    ):
        dynamic: dict[int, str] = {}
        for axis, label in wanted.items():
            if isinstance(shape[axis], int):
                notices.append(
                    f"axis {axis} ({label}) of input {name} is fixed to {shape[axis]}: "
                    "the model's code needs a constant there"
                )
            else:
                dynamic[axis] = symbols.setdefault(str(shape[axis]), label)
        specs.append(TensorSpec(name, tuple(tensor.shape), dtype_name(tensor), dynamic))
    return specs, symbols
