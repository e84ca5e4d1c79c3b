"""Counts multiply-accumulates, parameters and output shapes of a model, node by node."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from mil_cli.graph.branches import COND
from mil_cli.graph.nodes import get_argument, get_attribute, module_path, namespace, op_name
from mil_cli.ops import QUANTIZERS

with warnings.catch_warnings():
    # fvcore compiles a loss with torch.jit.script as it is imported, which torch warns of.
    warnings.simplefilter("ignore")
    from fvcore.nn import jit_handles  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from mil_cli.graph.model import Model


@dataclass(frozen=True)
class Layer:
    """What one node of the graph costs for one sample.

    Attributes:
        node: The node's name in the graph.
        module: The dotted path of the user's module that it ran in.
        op: The operator's short name.
        shape: The shape of its (first) output, batch axis included.
        macs: Multiply-accumulates.
        params: Numbers in the parameters that it is the first to read.
    """

    node: str
    module: str
    op: str
    shape: tuple[int, ...]
    macs: int
    params: int


def count_layers(model: Model) -> list[Layer]:
    """Count every call of the graph on one sample (the samples' own batch where it is fixed).

    Convolutions, linear layers, matrix products, attention and recurrent layers count; embeddings, norms, pooling,
    activations, element-wise operations and quantizers count nothing. Of `torch.cond` both branches count,
    where the samples can run both.
    """
    if model.training:  # running the graph would move its running statistics
        model = model.clone().eval()
    batch = 1 if model.spec.batch is not None else None
    args, kwargs = model.samples if batch is None else model.batch_input(batch)
    counter = _Counter(model.graph)
    with torch.no_grad():
        counter.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    return counter.layers


class _Counter(Interpreter):
    """Runs the graph on concrete tensors and keeps a `Layer` for each call."""

    def __init__(self, graph: GraphModule, prefix: str = "") -> None:
        super().__init__(graph)
        self.layers: list[Layer] = []
        self._prefix = prefix
        self._counted: set[int] = set()

    def run_node(self, n: Node) -> Any:
        if n.target is COND and self._prefix:
            self.layers += self._branches(n)
        elif n.target is COND:
            # The analysis of what can be cut does not look into branches that the samples cannot run either.
            with contextlib.suppress(RuntimeError, IndexError):
                self.layers += self._branches(n)
        result = super().run_node(n)
        if n.op == "call_function":
            shape = _first_shape(result)
            if shape is not None:
                macs = node_macs(n, self.env, result)
                self.layers.append(
                    Layer(self._prefix + n.name, module_path(n), op_name(n), shape, macs, self._new_params(n))
                )
        return result

    def _branches(self, node: Node) -> list[Layer]:
        """Return the layers of all branches of a choice."""
        (_, *branches, operands), _ = self.fetch_args_kwargs_from_env(node)
        layers = []
        for branch, body in zip(branches, node.args[1:3], strict=True):
            counter = _Counter(branch, f"{self._prefix}{body}.")
            counter.run(*operands)
            layers += counter.layers
        return layers

    def _new_params(self, node: Node) -> int:
        total = 0
        if op_name(node) == "lookup":
            return 0  # the weights that it reads from a codebook are those of the layer
        for lookup in (source for source in node.all_input_nodes if op_name(source) == "lookup"):
            indices = get_attribute(self.module, str(get_argument(lookup, "indices").target))
            if id(indices) not in self._counted:
                self._counted.add(id(indices))
                total += indices.numel()
        for source in map(_behind_quantizer, [] if op_name(node) in QUANTIZERS else node.all_input_nodes):
            value = get_attribute(self.module, str(source.target)) if source.op == "get_attr" else None
            if isinstance(value, nn.Parameter) and id(value) not in self._counted:
                self._counted.add(id(value))
                total += value.numel()
        return total


def _behind_quantizer(source: Node) -> Node:
    """Return the weight that a quantizer rounds for a layer, whose parameters it is; another value as it is."""
    rounded = get_argument(source, "x") if op_name(source) in QUANTIZERS else None
    return rounded if isinstance(rounded, Node) and rounded.op == "get_attr" else source


def node_macs(node: Node, values: dict[Node, Any], result: Any) -> int:
    """Return the multiply-accumulates of one call.

    Args:
        node: The call.
        values: What each node before it gave.
        result: What it gave.
    """
    handle = _HANDLES.get(op_name(node).removesuffix("_")) if namespace(node) == "aten" else None
    if handle is None:
        return 0

    def argument(name: str) -> Any:
        return torch.fx.node.map_arg(get_argument(node, name), lambda source: values[source])

    return int(handle(argument, result))


_Argument = Callable[[str], Any]


def _convolution(transposed: bool | None) -> Callable[[_Argument, Any], int]:
    def count(argument: _Argument, result: Any) -> int:
        flipped = bool(argument("transposed")) if transposed is None else transposed
        weight: Tensor = argument("weight")
        # fvcore takes the first axis for the batch, which a single sample may be without.
        shapes = [
            [math.prod(tensor.shape[: 1 - weight.ndim]), *tensor.shape[1 - weight.ndim :]]
            for tensor in (argument("input"), result)
        ]
        return int(jit_handles.conv_flop_count(shapes[0], list(weight.shape), shapes[1], flipped))

    return count


def _matrix_product(left: str, right: str) -> Callable[[_Argument, Any], int]:
    """Every product of two tensors, of a layer's input and its weight too, costs its output times the length summed."""

    def count(argument: _Argument, result: Any) -> int:
        first: Tensor = argument(left)
        return int(math.prod(result.shape) * (first.shape[-1] if first.ndim else 1))

    return count


def einsum_terms(equation: str) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, which has each letter that occurs once if it names none."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(letter for letter in set(inputs) if letter.isalpha() and inputs.count(letter) == 1)
        result = ("..." if "..." in inputs else "") + "".join(once)
    return inputs.split(","), result


def einsum_axes(term: str, rank: int) -> list[str]:
    """Return a name for each axis of an operand: its letters, and for an ellipsis the axes' places from the right.

    Args:
        term: The operand's letters.
        rank: Its number of axes; where letters do not name as many, the list is of another length.
    """
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{hidden - place}" for place in range(hidden)), *after]


def _einsum(argument: _Argument, result: Any) -> int:
    operands: Sequence[Tensor] = argument("tensors")
    if len(operands) < 2:
        return 0
    terms, output = einsum_terms(str(argument("equation")))
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for position, key in enumerate(einsum_axes(term, operand.ndim)):
            sizes[key] = max(sizes.get(key, 1), operand.shape[position])
    # Pairs are contracted from the left; labels that no later term and no output needs are summed away.
    total, seen = 0, _labels(terms[0], sizes)
    for index, term in enumerate(terms[1:], start=1):
        seen |= _labels(term, sizes)
        total += math.prod(sizes[label] for label in seen)
        needed = _labels(output, sizes).union(*(_labels(later, sizes) for later in terms[index + 1 :]))
        seen &= needed
    return total


def _labels(term: str, sizes: dict[str, int]) -> set[str]:
    dots = {label for label in sizes if label.startswith(".")} if "..." in term else set()
    return dots | set(term.replace("...", ""))


def _attention(argument: _Argument, result: Any) -> int:
    query, key, value = argument("query"), argument("key"), argument("value")
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(scores * (query.shape[-1] + value.shape[-1]))


def _recurrent(argument: _Argument, result: Any) -> int:
    """Each step multiplies the input and the hidden state by every weight matrix of its layer."""
    try:
        data = argument("input")
    except KeyError:  # packed sequences
        data = argument("data")
    steps = math.prod(data.shape[:-1])
    return int(steps * sum(weight.numel() for weight in argument("params") if weight.ndim == 2))


def _recurrent_cell(argument: _Argument, result: Any) -> int:
    rows = math.prod(argument("input").shape[:-1])
    return int(rows * (argument("w_ih").numel() + argument("w_hh").numel()))


def _bilinear(argument: _Argument, result: Any) -> int:
    return int(math.prod(argument("input1").shape[:-1]) * argument("weight").numel())


def _tensordot(argument: _Argument, result: Any) -> int:
    first: Tensor = argument("self")
    return int(math.prod(result.shape) * math.prod(first.shape[axis] for axis in argument("dims_self")))


_HANDLES: dict[str, Callable[[_Argument, Any], int]] = {
    **{f"conv{n}d": _convolution(False) for n in (1, 2, 3)},
    **{name: _convolution(True) for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")},
    "convolution": _convolution(None),
    "_convolution": _convolution(None),
    "linear": _matrix_product("input", "weight"),
    "matmul": _matrix_product("self", "other"),
    "mm": _matrix_product("self", "mat2"),
    "bmm": _matrix_product("self", "mat2"),
    "mv": _matrix_product("self", "vec"),
    "addmv": _matrix_product("mat", "vec"),
    "inner": _matrix_product("self", "other"),
    "dot": _matrix_product("self", "tensor"),
    "addmm": _matrix_product("mat1", "mat2"),
    "baddbmm": _matrix_product("batch1", "batch2"),
    "einsum": _einsum,
    "tensordot": _tensordot,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math": _attention,
    **{name: _recurrent_cell for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
    **{name: _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


def _first_shape(result: Any) -> tuple[int, ...] | None:
    if isinstance(result, tuple | list):
        result = next((value for value in result if isinstance(value, Tensor)), None)
    return tuple(result.shape) if isinstance(result, Tensor) else None
