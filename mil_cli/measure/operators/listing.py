"""From the calls of an analysed graph to the operators that onnxruntime runs in their place on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.fx import Node

from mil_cli.device.profile import Int8Form
from mil_cli.graph.coupling import Counter, Dropped, Removed, RunningCall
from mil_cli.graph.coupling.operators import argument, operator_name
from mil_cli.graph.nodes import calls
from mil_cli.measure.operators.operator import BLOCK, Operator, Shape, approximation, in_int8, make, unary

_FREE = frozenset(
    {
        *("dropout", "feature_dropout", "alias", "detach", "contiguous", "clone", "to", "_to_copy", "getitem"),
        *("lift_fresh_copy", "sym_size", "native_dropout"),
    }
)
"""Calls that are no longer there in the runtime's graph."""

_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"})
"""Calls that only give a tensor another shape: no data are moved, but the runtime makes a call of each."""

_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "leaky_relu"})
"""Activations that onnxruntime computes as it writes a convolution's result, for next to nothing."""

_ACTIVATIONS = frozenset({"sigmoid", "hardsigmoid", "tanh"})
"""Activations that it computes so in float only: integers are taken back to floats before."""

_UNARY = {
    **{"relu": "Relu", "relu6": "Clip", "hardtanh": "Clip", "clamp": "Clip", "clamp_min": "Relu"},
    **{"leaky_relu": "LeakyRelu", "gelu": "Gelu", "silu": "Silu", "mish": "Mish", "elu": "Elu", "selu": "Selu"},
    **{"sigmoid": "Sigmoid", "hardsigmoid": "HardSigmoid", "hardswish": "HardSwish", "tanh": "Tanh", "exp": "Exp"},
    **{"log": "Log", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "erf": "Erf", "softplus": "Softplus"},
    **{"reciprocal": "Reciprocal", "sin": "Sin", "cos": "Cos"},
}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
_REDUCTIONS = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax"}
_NORM_OF = ("batch_norm", "_native_batch_norm_legit_no_training")
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_LAYERS = _CONVOLUTIONS | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "_softmax"})

_Rule = Callable[["OperatorLister", RunningCall], tuple[Operator, ...]]


class OperatorLister:
    """Lists the operators of every cut of one analysed graph, without making it.

    What the runtime merges is one operator: a batch norm goes into the weights of the layer before it, a clamping
    activation and the addition of a shortcut into the convolution before them. An operator without a rule stands as
    one pass over the elements that it gives.

    In an int8 model every convolution and every product with a weight runs on integers, but for those that the device
    leaves float, and in convolutional nets so does every addition beside convolutions, which is an operator of its own
    there. The others are as in a float model.

    Args:
        counter: Tells which calls run after a cut, on which sizes.
        precision: Whether the model that ships is float or int8.
        form: The device's form of int8 models: where they have quantizers, and what stays float; None: the graph
            decides, and nothing does.
    """

    def __init__(
        self,
        counter: Counter,
        precision: Literal["float", "int8"] = "float",
        form: Int8Form | None = None,
    ) -> None:
        self._counter, self._form = counter, form
        self._int8 = precision == "int8"
        names = {operator_name(node) for node in calls(counter.coupling.graph)}
        convolutional = bool(names & _CONVOLUTIONS) and not names & _ATTENTION
        if form is not None and form.policy != "auto":
            convolutional = form.policy == "cnn"
        self._int8_additions = self._int8 and convolutional and not self._stays_float("conv2d")
        self._known: dict[tuple[Node, tuple[Shape | None, ...], tuple[Shape, ...], bool], tuple[Operator, ...]] = {}

    def operators(self, removed: Removed, dropped: Dropped = frozenset()) -> list[Operator]:
        """Return what runs for one sample after a cut, in order.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        return [one for operators in self.by_call(removed, dropped).values() for one in operators]

    def by_call(self, removed: Removed, dropped: Dropped = frozenset()) -> dict[str, tuple[Operator, ...]]:
        """Return what runs for one sample after a cut by the name of the call that it stands for, in order.

        Calls that the runtime merges with another one, or leaves out, have no operators.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        found: dict[str, tuple[Operator, ...]] = {}
        for call in self._counter.running(removed, dropped):
            source = _source(call.node)
            alone = source is not None and source.name in dropped  # what it would have been merged with is gone
            identity = (call.node, call.inputs, call.outputs, alone)
            if identity not in self._known:
                self._known[identity] = self._operators(call, alone)
            found[call.node.name] = self._known[identity]
        return found

    def approximated(self) -> tuple[str, ...]:
        """Return the names of calls that count operations and have no rule, so that their time is a guess."""
        counted = self._counter.macs_by_node({})
        running = (call.node for call in self._counter.running({}) if counted.get(call.node.name))
        return tuple(node.name for node in running if _name(node) not in _RULES)

    def _operators(self, call: RunningCall, alone: bool) -> tuple[Operator, ...]:
        name = _name(call.node)
        if name in _FREE:
            return ()
        if name in _VIEWS:
            return (_view(call),)
        if self._is_merged(call, name, alone):
            return ()
        rule = _RULES.get(name)
        if rule is None:
            return (approximation(_elements(call)),)
        operators = rule(self, call)
        return tuple(map(in_int8, operators)) if self._is_int8(call.node, name, operators) else operators

    def _is_int8(self, node: Node, name: str, operators: tuple[Operator, ...]) -> bool:
        if name == "add":
            return self._int8_additions and self._joins(node)
        layer = name in _CONVOLUTIONS or (name != "addmm" and operators[0].kind == "linear")
        return self._int8 and layer and not self._stays_float(name)

    def _stays_float(self, name: str) -> bool:
        return self._form is not None and self._form.leaves_float(name)

    def _is_merged(self, call: RunningCall, name: str, alone: bool) -> bool:
        """Whether onnxruntime computes a call as part of the layer before it; not if that is gone (`alone`)."""
        node = call.node
        if name == "add":
            return not self._int8_additions and self._joins(node) and _in_blocks(call)
        source = _source(node)
        if source is None or len(source.users) > 1 or alone:
            return False
        before = _name(source)
        if name in _NORM_OF:
            return before in (*_LAYERS, "linear", "addmm")
        if name in _CLAMPS:
            joined = before == "add" and self._joins(source) and (self._int8_additions or _in_blocks(call))
            return before in _LAYERS or joined or _folds_into_conv(source)
        if name in _ACTIVATIONS or (name == "hardswish" and _in_blocks(call)):
            return not self._int8 and (before in _CONVOLUTIONS or _folds_into_conv(source))
        return False

    def _joins(self, node: Node) -> bool:
        """Whether an addition of two tensors of one shape takes one straight from a 2-d convolution, and alone."""
        shapes = self._counter.coupling.recording.shapes
        operands = node.all_input_nodes
        if len(operands) != 2 or any(shapes.get(self.key(used)) != shapes[node.name] for used in operands):
            return False
        for operand in operands:
            conv = _source(operand) if _folds_into_conv(operand) else operand
            if conv is not None and _name(conv) == "conv2d" and len(operand.users) == 1:
                return True
        return False

    def key(self, node: Node) -> str:
        """Return the key of a node's tensor."""
        return self._counter.coupling.recording.key(node)

    def value(self, value: Any) -> Any:
        """Return an argument with what the run of the analysis gave in place of nodes."""
        return self._counter.coupling.recording.value(value)


def _name(node: Node) -> str:
    name = operator_name(node)
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def _source(node: Node) -> Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, Node) else None


def _folds_into_conv(node: Node) -> bool:
    source = _source(node)
    return _name(node) in _NORM_OF and source is not None and _name(source) in _LAYERS and len(source.users) == 1


def _in_blocks(call: RunningCall) -> bool:
    return call.outputs[0][1] % BLOCK == 0


def _elements(call: RunningCall) -> int:
    return sum(math.prod(shape) for shape in call.outputs)


def _shape_of(call: RunningCall, name: str) -> Shape | None:
    """Return the shape of a tensor argument, None where it is left out."""
    value = argument(call.node, name)
    return call.inputs[call.node.all_input_nodes.index(value)] if isinstance(value, Node) else None


def _required(call: RunningCall, name: str) -> Shape:
    shape = _shape_of(call, name)
    return () if shape is None else shape


def _view(call: RunningCall) -> Operator:
    return make("view", ((1,),), 1)


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * length if len(values) == 1 else values


def _conv(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    data, weight = _required(call, "input"), _required(call, "weight")
    axes = len(data) - 2
    padding = argument(call.node, "padding", 0)
    dilation = _tuple(lister.value(argument(call.node, "dilation", 1)), axes)
    if isinstance(padding, str):
        reach = [step * (size - 1) for step, size in zip(dilation, weight[2:], strict=True)]
        before = tuple(total // 2 if padding == "same" else 0 for total in reach)
        after = tuple(total - total // 2 if padding == "same" else 0 for total in reach)
    else:
        before = after = _tuple(lister.value(padding), axes)
    attributes: dict[str, Any] = {
        "stride": _tuple(lister.value(argument(call.node, "stride", 1)), axes),
        "padding": (*before, *after),
        "dilation": dilation,
        "groups": argument(call.node, "groups", 1),
    }
    kind = "conv"
    if _name(call.node).startswith("conv_transpose"):
        kind = "conv_transpose"
        attributes["output_padding"] = _tuple(lister.value(argument(call.node, "output_padding", 0)), axes)
    if attributes["groups"] > 1:  # a cut may have taken whole groups
        attributes["groups"] = (data if kind == "conv" else call.outputs[0])[1] // weight[1]
    return (make(kind, (data, weight), _elements(call), **attributes),)


def _linear(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    data, weight = _required(call, "input"), _required(call, "weight")
    bias = _shape_of(call, "bias") is not None
    users = list(call.node.users)
    # The addition of a bias becomes one with a GELU that follows it.
    bias = bias and not (len(users) == 1 and _name(users[0]) == "gelu")
    rows = math.prod(data[:-1])
    return (make("linear", ((rows, data[-1]), weight), _elements(call), gemm=len(data) == 2, bias=bias),)


def _addmm(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    left, right = _required(call, "mat1"), _required(call, "mat2")
    return (make("linear", (left, right[::-1]), _elements(call), gemm=True, bias=True),)


def _matmul(left: str, right: str) -> _Rule:
    def rule(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
        shapes = (_required(call, left), _required(call, right))
        fixed = [argument(call.node, name).op == "get_attr" for name in (left, right)]
        constant = "right" if fixed[1] else "left" if fixed[0] else ""
        if constant == "right" and len(shapes[1]) == 2:  # a linear layer without a bias
            rows = (math.prod(shapes[0][:-1]), shapes[0][-1])
            return (make("linear", (rows, shapes[1][::-1]), _elements(call), gemm=False, bias=False),)
        return (make("matmul", shapes, _elements(call), constant=constant),)

    return rule


def _attention(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    shapes = tuple(_required(call, name) for name in ("query", "key", "value"))
    masked = _shape_of(call, "attn_mask") is not None or bool(argument(call.node, "is_causal", False))
    return (make("attention", shapes, _elements(call), masked=masked),)


def _batch_norm(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    return (make("batch_norm", call.outputs[:1], _elements(call)),)


def _layer_norm(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    width = math.prod(call.outputs[0][-len(argument(call.node, "normalized_shape")) :])
    elements = _elements(call)
    return (make("layer_norm", ((elements // width, width),), elements),)


def _softmax(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    width = call.outputs[0][lister.value(argument(call.node, "dim", -1))]
    elements = _elements(call)
    return (make("softmax", ((elements // width, width),), elements),)


def _unary(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    return (unary(_elements(call), _UNARY[_name(call.node)]),)


def _binary(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    function = _BINARY[_name(call.node)]
    shapes = [_shape_of(call, name) for name in ("self", "other")]
    first, second = (shape if shape is not None else () for shape in shapes)
    elements = _elements(call)
    if first == second:
        first = second = (elements,)
    return (make("binary", (first, second), elements, function=function),)


def _pool(function: str) -> _Rule:
    def rule(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
        data = call.inputs[0] or ()
        axes = 1 if "1d" in _name(call.node) else 3 if "3d" in _name(call.node) else 2
        kernel = _tuple(lister.value(argument(call.node, "kernel_size")), axes)
        stride = argument(call.node, "stride") or kernel
        padding = _tuple(lister.value(argument(call.node, "padding", 0)), axes)
        return (
            make(
                "pool",
                (data,),
                _elements(call),
                function=function,
                kernel=kernel,
                stride=_tuple(lister.value(stride), axes),
                padding=(*padding, *padding),
                ceil=bool(argument(call.node, "ceil_mode", False)),
            ),
        )

    return rule


def _adaptive_pool(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    data, result = call.inputs[0] or (), call.outputs[0]
    axes = tuple(axis for axis in range(2, len(data)) if result[axis] != data[axis])
    if any(result[axis] != 1 for axis in axes):
        return (approximation(math.prod(data)),)
    return (make("reduce", (data,), _elements(call), function="ReduceMean", axes=axes),)


def _reduce(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    data = call.inputs[0] or ()
    dims = argument(call.node, "dim")
    every = list(range(len(data)))
    axes = tuple(sorted({axis % len(data) for axis in _tuple(lister.value(dims), 1)})) if dims else tuple(every)
    return (make("reduce", (data,), _elements(call), function=_REDUCTIONS[_name(call.node)], axes=axes),)


def _transpose(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    data = call.inputs[0] or ()
    order = list(range(len(data)))
    name = _name(call.node)
    if name == "permute":
        order = [axis % len(data) for axis in lister.value(argument(call.node, "dims"))]
    elif name == "t":
        order.reverse()
    else:
        first, second = (argument(call.node, side) for side in ("dim0", "dim1"))
        order[first], order[second] = order[second], order[first]
    moved = [axis for axis in order if data[axis] != 1]
    if moved == sorted(moved):  # only axes of one element change places
        return (_view(call),)
    rank = {axis: position for position, axis in enumerate(sorted(moved))}
    shape = tuple(data[axis] for axis in sorted(moved))
    return (make("transpose", (shape,), _elements(call), order=tuple(rank[axis] for axis in moved)),)


def _embedding(lister: OperatorLister, call: RunningCall) -> tuple[Operator, ...]:
    count = math.prod(_required(call, "indices"))
    return (make("gather", (_required(call, "weight"), (count,)), _elements(call)),)


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_LAYERS, _conv),
    **dict.fromkeys(_NORM_OF, _batch_norm),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t"), _transpose),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **{f"max_pool{axes}d": _pool("MaxPool") for axes in (1, 2, 3)},
    **{f"avg_pool{axes}d": _pool("AveragePool") for axes in (1, 2, 3)},
    **{f"adaptive_avg_pool{axes}d": _adaptive_pool for axes in (1, 2, 3)},
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul("self", "other"),
    "mm": _matmul("self", "mat2"),
    "bmm": _matmul("self", "mat2"),
    "scaled_dot_product_attention": _attention,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
}
