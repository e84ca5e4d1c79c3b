"""The Model: a captured graph with its weights, what it takes and gives, and samples to run it with."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from mil_cli.errors import ModelError
from mil_cli.graph.mode import bind_mode_methods, set_mode
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.graph.spec import ModelSpec
from mil_cli.graph.tree import runtime_spec

_TRANSIENT = "mil_non_persistent"


@dataclass
class Model:
    """A captured graph of ATen ops with named weights.

    A stage never changes the model it is given: it clones first.

    Attributes:
        graph: The graph module, callable as the user's module was; its weights have the user's names.
        spec: Its inputs, outputs, their trees and names, the task, the source, notices.
        samples: Example ``(args, kwargs)``, CPU tensors of a small batch: to re-export, to count, to verify.
    """

    graph: GraphModule
    spec: ModelSpec
    samples: tuple[tuple[Any, ...], dict[str, Any]]

    def __post_init__(self) -> None:
        bind_mode_methods(self.graph)
        _restore_persistence(self.graph)

    @classmethod
    def capture(
        cls,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        dynamic: Mapping[str, Mapping[int, str]] | None = None,
        source: str = "",
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> Model:
        """Capture a module; see `mil_cli.graph.capture.capture`."""
        from mil_cli.graph.capture import capture

        return capture(
            module,
            args,
            kwargs,
            dynamic=dynamic,
            source=source,
            input_names=input_names,
            output_names=output_names,
        )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a `.pt2` archive safely; see `mil_cli.graph.archive.load`."""
        from mil_cli.graph.archive import load

        return load(Path(path))

    def save(self, path: Path) -> None:
        """Write a `.pt2` archive, its sidecar and its samples; see `mil_cli.graph.archive.save`."""
        from mil_cli.graph.archive import save

        save(self, Path(path))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in its present mode, on the user's own args and kwargs."""
        return self.graph(*args, **kwargs)

    @property
    def training(self) -> bool:
        """Whether the graph is in training mode."""
        return bool(self.graph.training)

    def train(self, mode: bool = True) -> Model:
        """Switch to training mode (or back), in place, by rewriting node arguments."""
        set_mode(self.graph, mode)
        return self

    def eval(self) -> Model:
        """Switch to evaluation mode, in place."""
        return self.train(False)

    def clone(self) -> Model:
        """Return a deep copy: tied parameters stay tied, modes and gradient flags are kept."""
        return Model(
            graph=copy_graph(self.graph),
            spec=self.spec,
            samples=pytree.tree_map_only(Tensor, torch.clone, self.samples),
        )

    def export_program(self) -> ExportedProgram:
        """Export the graph again, in evaluation mode, with the dynamic dimensions of the spec."""
        from mil_cli.graph.program import export_model

        return export_model(self)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, each once."""
        return self.graph.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by the user's names, each once."""
        return self.graph.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by the user's own names; tied ones appear under each name."""
        return self.graph.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights in, by name, all of them.

        Raises:
            RuntimeError: If names or shapes differ.
        """
        self.graph.load_state_dict(state)

    def num_params(self) -> int:
        """How many numbers the parameters that the graph uses hold; tied ones count once, clustered weights in full."""
        used = {}
        for node in self.graph.graph.find_nodes(op="get_attr"):
            readers = {op_name(user) for user in node.users}
            value = get_attribute(self.graph, str(node.target))
            if readers == {"lookup"}:  # of a clustered weight the indices count, not the codebook
                used[id(value)] = 0 if value.is_floating_point() else value.numel()
            elif readers and isinstance(value, nn.Parameter):
                used[id(value)] = value.numel()
        return sum(used.values())

    def macs(self) -> int:
        """Multiply-accumulates of one sample: convolutions, linear layers, matrix products, attention, recurrence."""
        from mil_cli.graph.count import count_layers

        return sum(layer.macs for layer in count_layers(self))

    def batch_input(self, batch_size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the samples' ``(args, kwargs)`` cut or repeated to `batch_size` along the batch axis.

        Raises:
            ModelError: If the model's batch is fixed to another size.
        """
        from mil_cli.graph.samples import resize_batch

        return resize_batch(self.samples, self.spec, batch_size)

    def flat_inputs(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the tensors of a call, in the order of `spec.inputs`.

        Raises:
            ModelError: If the call does not have the form that was captured.
        """
        from mil_cli.graph.samples import flatten_call

        return flatten_call(self.spec, args, kwargs)

    def flatten_outputs(self, outputs: Any) -> list[Tensor]:
        """Return the tensors of what a call returned, in the order of `spec.outputs`."""
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]

    def unflatten_outputs(self, tensors: Sequence[Tensor]) -> Any:
        """Put output tensors, in the order of `spec.outputs`, back into the tree that a call returns.

        Raises:
            ModelError: If there are not as many as the model gives.
        """
        if len(tensors) != len(self.spec.outputs):
            raise ModelError(f"the model gives {len(self.spec.outputs)} tensors", value=len(tensors))
        tree = runtime_spec(pytree.treespec_loads(self.spec.out_tree))
        remaining = iter(tensors)
        constants = self.spec.out_constants
        leaves = [constants[index] if index in constants else next(remaining) for index in range(tree.num_leaves)]
        return pytree.tree_unflatten(leaves, tree)

    def fingerprint(self) -> str:
        """The SHA-256 of the evaluation graph, every tensor in it, and what it takes and gives.

        Names of nodes and dead code do not count, so it survives an archive.
        """
        digest = hashlib.sha256()
        spec = self.spec.to_json()
        for key in ("inputs", "outputs", "in_tree", "out_tree", "out_constants", "task"):
            digest.update(f"{key}={spec[key]!r}\n".encode())
        model = self.clone().eval() if self.training else self
        for line in _canonical(model.graph):
            digest.update(line.encode() + b"\n")
        for name, value in sorted(_tensors(model.graph).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def copy_graph(graph: GraphModule) -> GraphModule:
    """Return a deep copy of a graph module that keeps its state dict's names, mode and tied weights.

    Plain `copy.deepcopy` makes torch warn of its own leaf class, loses the mode methods, and makes every tensor a
    persistent buffer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        result = copy.deepcopy(graph)
    bind_mode_methods(result)
    _restore_persistence(result)
    return result


def mark_transient(graph: GraphModule, names: Sequence[str]) -> None:
    """Remember which buffers stay out of the state dict; copies of the graph module keep that."""
    graph.meta[_TRANSIENT] = sorted(set(graph.meta.get(_TRANSIENT, ())) | set(names))
    _restore_persistence(graph)


def _restore_persistence(graph: GraphModule) -> None:
    """Deep copies of a graph module make every tensor a persistent buffer; undo that."""
    for name in graph.meta.get(_TRANSIENT, ()):
        owner_path, _, leaf = name.rpartition(".")
        try:
            owner = graph.get_submodule(owner_path)
        except AttributeError:
            continue
        if leaf in owner._buffers:
            owner._non_persistent_buffers_set.add(leaf)


def _tensors(graph: GraphModule) -> dict[str, Tensor]:
    """Every tensor that counts: the state dict, and what the graph reads beside it."""
    values: dict[str, Tensor] = dict(graph.state_dict())
    for node in graph.graph.find_nodes(op="get_attr"):
        value = get_attribute(graph, str(node.target)) if node.users else None
        if isinstance(value, Tensor):
            values[str(node.target)] = value
    return values


def _canonical(graph: GraphModule) -> Iterator[str]:
    """Yield one line for each live node, whatever the nodes are called and however their arguments are passed."""
    order = _live_calls(graph)
    number = {node: index for index, node in enumerate(order)}
    inputs = {node: index for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    # Tied weights have several names; it does not matter which one a node reads.
    named = graph.named_parameters(remove_duplicate=False)
    first_names: dict[int, str] = {}
    for name, parameter in named:
        first_names.setdefault(id(parameter), name)

    def show(node: torch.fx.Node) -> _Shown:
        if node.op == "get_attr":
            target = str(node.target)
            value = get_attribute(graph, target)
            if isinstance(value, GraphModule):
                return _Shown("[" + "; ".join(_canonical(value)) + "]")
            return _Shown(f"@{first_names.get(id(value), target)}")
        return _Shown(f"%{number[node]}" if node in number else f"${inputs[node]}")

    for node in [*order, graph.graph.output_node()]:
        arguments = torch.fx.node.map_arg(_arguments(node), show)
        yield f"{op_name(node)} {node.target} {arguments!r}"


def _live_calls(graph: GraphModule) -> list[torch.fx.Node]:
    """Return the calls that count, operands first; where nothing is written into, in an order of their own.

    Loading an archive may move calls that only depend on shapes to where they are first used.
    """
    ends = [*(node for node in calls(graph) if node.is_impure()), graph.graph.output_node()]
    live: dict[torch.fx.Node, None] = {}
    pending = [(end, False) for end in reversed(ends)]
    while pending:
        node, after_operands = pending.pop()
        if after_operands:
            live[node] = None
        elif node not in live:
            pending.append((node, True))
            operands: list[torch.fx.Node] = []
            torch.fx.node.map_arg(_arguments(node), operands.append)
            pending.extend((used, False) for used in reversed(operands) if used not in live)
    order = graph.graph.nodes if any(_writes(node) for node in live) else live
    return [node for node in order if node in live and node.op == "call_function"]


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _arguments(node: torch.fx.Node) -> Any:
    """Return the arguments of a node by name, without those that have their default value."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args, node.kwargs
    given = {argument.name: get_argument(node, argument.name) for argument in node.target._schema.arguments}
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    return {name: value for name, value in given.items() if isinstance(value, torch.fx.Node) or value != defaults[name]}


class _Shown(str):
    """A string that shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
