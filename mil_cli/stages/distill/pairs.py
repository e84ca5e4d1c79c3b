"""Which layers of student and teacher are compared: found in both graphs, or given by the recipe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import ModelError, StageError
from mil_cli.graph.bottlenecks import bottlenecks, on_the_way
from mil_cli.graph.channels import channel_axis
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_attribute, module_stack, op_name
from mil_cli.graph.taps import module_output, module_outputs, tap
from mil_cli.stages.distill.alignment import Positions, Tokens, meeting

_CONTAINERS = ("Sequential", "ModuleList")
_FEW = 3  # of bottlenecks: long shortcuts, as in a U-net, go around everything, and any module's output will do


@dataclass(frozen=True)
class Layer:
    """A layer whose output is compared.

    Attributes:
        path: Its module path.
        axis: The axis of the channels in its output.
        shape: Of its output for the sample batch, that axis moved to the second place: (batch, channels, *positions).
    """

    path: str
    axis: int
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """How many channels its output has."""
        return self.shape[1]

    @property
    def positions(self) -> Positions:
        """Sizes of the other axes: none for a vector, tokens, or height and width."""
        return self.shape[2:]

    @property
    def tokens(self) -> bool:
        """Whether its sequence is one of tokens, channels last: those of a convolution over time stand second."""
        return self.axis == 2

    @property
    def resolution(self) -> int:
        """How many positions there are."""
        return math.prod(self.positions)

    def read(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return its output among tapped values as float32 of shape (batch, channels, *positions)."""
        return values[self.path].movedim(self.axis, 1).float()


@dataclass(frozen=True)
class Pair:
    """Two layers that are compared.

    Attributes:
        student: The one that learns.
        teacher: The one that it learns from.
    """

    student: Layer
    teacher: Layer

    @property
    def tokens(self) -> Tokens:
        """Whether the sequences of both are of tokens; see `mil_cli.stages.distill.alignment.aligned`."""
        return self.student.tokens, self.teacher.tokens

    def meeting(self) -> tuple[Positions, Positions, Positions] | None:
        """Return how both lie and where they are compared, or None; see `mil_cli.stages.distill.alignment.meeting`."""
        return meeting(self.student.positions, self.teacher.positions, tokens=self.tokens)

    def facts(self) -> dict[str, Any]:
        """Return what the report shows."""
        return {
            "student": self.student.path,
            "teacher": self.teacher.path,
            "student_shape": list(self.student.shape[1:]),
            "teacher_shape": list(self.teacher.shape[1:]),
        }


def pair_layers(
    student: Model, teacher: Model, *, given: Mapping[str, str], count: int, mapped: bool, where: str
) -> list[Pair]:
    """Return the layers to compare, in the student's order of execution.

    Layers are found among the bottlenecks of both graphs before their last weights, where the network's state is whole:
    ends of residual blocks, of stages; among the outputs of all modules on the way where there are hardly any. If the
    student's layers go by the teacher's names and resolutions (it was cut or quantized from it) the same names are
    paired, else each is paired with the layer of the nearest resolution, as deep among those, in the same order. The
    last is always among those chosen, and the last of both belong together; ends of stages go before what lies in them.

    Args:
        student: The student.
        teacher: The teacher.
        given: Module paths of the student and of the teacher to pair, in place of what would be found.
        count: How many pairs to find, at most.
        mapped: Whether layers must have more than one position.
        where: The recipe's key that names the pairs.

    Raises:
        StageError: A path is unknown, two layers can't be compared, or no pair is found.
    """
    if given:
        return _given_pairs(student, teacher, given, mapped=mapped, where=where)
    ours, theirs = _found_layers(student, mapped=mapped), _found_layers(teacher, mapped=mapped)
    pairs = _by_name(ours, theirs)
    chosen = (
        [pairs[index] for index in _spread([pair.student.resolution for pair in pairs], count)]
        if pairs
        else _by_resolution(ours, _spread([layer.resolution for layer in ours], count), theirs)
    )
    if not chosen:
        raise StageError(
            "student and teacher have no layers that could be compared by themselves",
            where=where,
            hint="name them: a mapping of the student's module paths to the teacher's (mil inspect lists them)",
        )
    return chosen


def _given_pairs(student: Model, teacher: Model, given: Mapping[str, str], *, mapped: bool, where: str) -> list[Pair]:
    ours = _layers(student, _known(student, list(given), who="student", where=where))
    theirs = _layers(teacher, _known(teacher, list(given.values()), who="teacher", where=where))
    pairs = []
    for path, other in given.items():
        one, two = ours.get(path), theirs.get(other)
        for name, layer in ((path, one), (other, two)):
            if layer is None:
                raise StageError(
                    f"the output of '{name}' is no feature of each sample, of shape (batch, channels, ...)",
                    where=where,
                    value={path: other},
                )
        pairs.append(_comparable(one, two, mapped=mapped, where=where))  # type: ignore[arg-type]
    return pairs


def _known(model: Model, paths: Sequence[str], *, who: str, where: str) -> dict[str, Node]:
    found = {}
    for path in paths:
        try:
            found[path] = module_output(model, path)
        except ModelError as problem:
            raise StageError(
                f"the {who} has no module whose output could be read here", where=where, value=path, hint=problem.hint
            ) from problem
    return found


def _comparable(student: Layer, teacher: Layer, *, mapped: bool, where: str) -> Pair:
    found = Pair(student, teacher).meeting()
    pair, shapes = {student.path: teacher.path}, f"{list(student.shape)} and {list(teacher.shape)}"
    if found is None:
        raise StageError(
            f"outputs of shape {shapes} cannot be compared",
            where=where,
            value=pair,
            hint="pair maps with maps or with as many tokens, sequences with sequences",
        )
    if mapped and math.prod(found[2]) < 2:
        raise StageError(
            f"outputs of shape {shapes} meet at a single position, where there is no attention to compare",
            where=where,
            value=pair,
            hint="pair layers before the pooling",
        )
    return Pair(student, teacher)


def _found_layers(model: Model, *, mapped: bool) -> list[Layer]:
    """Return the layers that may be paired, in order of execution."""
    paths: dict[Node, str] = {}
    for path, node in module_outputs(model).items():  # of modules around others the outer one comes first
        paths.setdefault(node, path)
    readable = [node for node in _before_last_weights(model.graph) if node in paths]
    narrow = set(bottlenecks(model.graph))
    nodes = [node for node in readable if node in narrow]
    if len(nodes) < _FEW:
        nodes = readable
    points = {paths[node]: node for node in nodes}
    blocks = _blocks(model, points)
    outer = {path: node for path, node in points.items() if not path.startswith(blocks)}
    return [layer for layer in _layers(model, outer).values() if not mapped or layer.resolution > 1]


def _blocks(model: Model, paths: Iterable[str]) -> tuple[str, ...]:
    """Return what the paths of everything inside a block begin with: an element of a list, itself no list."""
    classes = dict(pair for node in calls(model.graph) for pair in module_stack(node))
    return tuple(
        f"{path}." for path in paths if path.rpartition(".")[2].isdigit() and not classes[path].endswith(_CONTAINERS)
    )


def _before_last_weights(graph: GraphModule) -> list[Node]:
    """Return the calls that stand for a state of the network, in order of execution: no outputs, nothing half done."""
    way = on_the_way(graph)
    steps = [node for node in calls(graph) if node in way]
    last = max((position for position, node in enumerate(steps) if _weighs(graph, node, way)), default=0)
    # Folding leaves no trace of what stood between a layer and its batch norm; dropout is noise.
    return [
        node
        for node in steps[:last]
        if {op_name(user) for user in node.users} != {"batch_norm"} and not op_name(node).startswith("dropout")
    ]


def _weighs(graph: GraphModule, node: Node, way: set[Node]) -> bool:
    """Whether a node on the way reads a matrix of weights, through quantizers and what makes their scales too."""
    seen: set[Node] = set()
    pending = [used for used in node.all_input_nodes if used not in way]
    while pending:
        source = pending.pop()
        if source.op == "get_attr":
            value = get_attribute(graph, str(source.target))
            if isinstance(value, torch.nn.Parameter) and value.ndim > 1:
                return True
        seen.add(source)
        pending.extend(used for used in source.all_input_nodes if used not in way and used not in seen)
    return False


def _layers(model: Model, nodes: Mapping[str, Node]) -> dict[str, Layer]:
    """Return what is known of layers after a run on the samples, without those that give no feature of each sample."""
    if not nodes:
        return {}
    args, kwargs = model.samples
    with torch.no_grad():
        _, values = tap(model.clone().eval(), list(nodes))(*args, **kwargs)
    leaves = zip(model.flat_inputs(*args, **kwargs), model.spec.inputs, strict=True)
    sizes = [leaf.shape[spec.batch_axis() or 0] for leaf, spec in leaves if leaf.ndim]
    layers = {}
    for path, value in values.items():
        axis = channel_axis(nodes[path]) if isinstance(nodes[path].meta.get("val"), Tensor) else None
        if axis is not None and value.is_floating_point() and value.shape[0] == sizes[0]:
            layers[path] = Layer(path, axis, tuple(value.movedim(axis, 1).shape))
    return layers


def _by_name(student: Sequence[Layer], teacher: Sequence[Layer]) -> list[Pair]:
    """Return the pairs of the same name, if these are the student's layers and have the same positions; else none."""
    known = {layer.path: layer for layer in teacher}
    pairs = [Pair(layer, known[layer.path]) for layer in student if layer.path in known]
    alike = all(pair.student.positions == pair.teacher.positions for pair in pairs)
    return pairs if alike and 2 * len(pairs) >= len(student) else []


def _spread(resolutions: Sequence[int], count: int) -> list[int]:
    """Choose some of a network's layers evenly.

    Args:
        resolutions: How many positions each layer has, in order of execution.
        count: How many to choose, at most.

    Returns:
        Indices in ascending order. Layers in a row with as many positions are a stage; the last of a stage goes before
        others, and where there are more stages than asked for the last ones of evenly spread stages are chosen.
    """
    stages: list[list[int]] = []
    for index, resolution in enumerate(resolutions):
        if index == 0 or resolution != resolutions[index - 1]:
            stages.append([])
        stages[-1].append(index)
    shares = [0] * len(stages)
    for index in _evenly(len(stages), count):
        shares[index] = 1
    while sum(shares) < min(count, len(resolutions)):
        # The stage with the most layers for each chosen one gets the next, a later one before an earlier.
        free = (index for index in range(len(stages)) if shares[index] < len(stages[index]))
        shares[max(free, key=lambda index: (len(stages[index]) / (shares[index] + 1), index))] += 1
    return [stage[index] for stage, share in zip(stages, shares, strict=True) for index in _evenly(len(stage), share)]


def _evenly(length: int, count: int) -> list[int]:
    """Return so many of the indices below a length, the last one included."""
    count = min(count, length)
    return [-(-(step + 1) * length // count) - 1 for step in range(count)]


def _by_resolution(student: Sequence[Layer], chosen: Sequence[int], teacher: Sequence[Layer]) -> list[Pair]:
    """Pair layers in order, each once and the last with the last, so that resolutions and places in stages fit best.

    Args:
        student: The student's layers.
        chosen: Indices of those to pair; if the teacher has fewer layers the first are left out.
        teacher: The teacher's layers.
    """
    chosen = chosen[max(len(chosen) - len(teacher), 0) :]
    ours, theirs = _depths(student), _depths(teacher)

    def cost(one: int, other: int) -> float:
        ends = one == len(student) - 1, other == len(teacher) - 1
        if ends[0] != ends[1] or Pair(student[one], teacher[other]).meeting() is None:
            return math.inf
        finer = math.log2(student[one].resolution) - math.log2(teacher[other].resolution)
        return abs(finer) + abs(ours[one] - theirs[other])

    # best[j]: the least cost of pairing the student's layers so far with teacher's layers below j, and those layers.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(teacher) + 1)
    for one in chosen:
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for other, (before, partners) in enumerate(best[:-1]):
            paired = (before + cost(one, other), (*partners, other))
            row.append(min(row[-1], paired, key=lambda found: found[0]))
        best = row
    total, partners = best[-1]
    if math.isinf(total):
        return []
    return [Pair(student[one], teacher[other]) for one, other in zip(chosen, partners, strict=True)]


def _depths(layers: Sequence[Layer]) -> list[float]:
    """Return how deep each layer lies among those of its resolution, up to 1 for the last."""
    sizes = Counter(layer.resolution for layer in layers)
    seen: Counter[int] = Counter()
    depths = []
    for layer in layers:
        seen[layer.resolution] += 1
        depths.append(seen[layer.resolution] / sizes[layer.resolution])
    return depths
