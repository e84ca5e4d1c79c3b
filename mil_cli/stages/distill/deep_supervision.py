"""Deep supervision: heads inside the model learn the labels and the model's own outputs, and are dropped in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from mil_cli.errors import ModelError, StageError
from mil_cli.graph.channels import channel_axis
from mil_cli.graph.nodes import calls
from mil_cli.graph.taps import module_output, tap, tappable_paths
from mil_cli.stages.distill.distil import DistillConfig, Lesson, report, student_of, teach
from mil_cli.stages.registry import stage
from mil_cli.training.evaluate import fixed_batch
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_SAMPLES = 2
_NEAR = 0.35
"""Part of the distance between two heads within which an outer module is preferred to a nearer one inside it."""


class DeepSupervisionConfig(DistillConfig):
    """Settings of deep supervision.

    Attributes:
        heads: How many heads, at even depth, where `at` is not given.
        at: Paths of the modules whose outputs heads read.
        temperature: T, by which the class scores are divided; no meaning for tasks without classes.
        weight: Share of the model's own outputs in each head's loss, beside the labels.
    """

    method: ClassVar[str] = "deep_supervision"

    heads: int = Field(2, ge=1, le=16)
    at: tuple[str, ...] = ()
    temperature: float = Field(3.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.3, ge=0, le=1)


@stage(DeepSupervisionConfig)
def deep_supervision(model: Model, config: DeepSupervisionConfig, context: Context) -> Model:
    """Train the student on loss + sum over heads of (1 - weight) * loss + weight * distance to the model's own outputs.

    Zhang et al. 2019, "Be Your Own Teacher": the deepest outputs teach the shallow layers, through small heads that are
    trained along and dropped. No teacher is needed. The distance gives the final outputs no gradient. The paper's third
    term, the distance of shallow features to the deepest ones, is left out.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer and seed.

    Returns:
        The trained student, in evaluation mode, without heads.

    Raises:
        StageError: No module lies where a head can read it, or the loss reads several outputs; the student cannot take
            the model's place.
    """
    student, settings = student_of(model, config, context), context.trainer(config.trainer)
    scored = _scored(student, context)
    found = _usable(student, scored, config, context)
    paths = config.at or spread(student, list(found), count=config.heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        heads = nn.ModuleList(Head(found[path]) for path in paths)
    context.note(heads=list(paths))
    result = teach(
        student,
        [],
        context,
        lambda lesson: deep_objective(lesson, config, heads=heads, paths=paths, place=scored.place),
        settings=settings,
        cache_gb=0.0,
        doing="training with heads",
        taps=paths,
        companions=heads,
    )
    return report(student, result, config, context, settings=settings)


def deep_objective(
    lesson: Lesson, config: DeepSupervisionConfig, *, heads: nn.ModuleList, paths: Sequence[str], place: int
) -> Objective:
    """Return (outputs, batch) -> the loss of the model and those of its heads.

    Args:
        lesson: Task and training; no teacher.
        config: The settings.
        heads: In the order of `paths`.
        paths: The modules that they read.
        place: Which of the outputs, flattened, a head gives.
    """
    task = lesson.task

    def objective(outputs: Any, batch: Batch) -> Tensor:
        values = lesson.running.tapped()
        leaves, tree = pytree.tree_flatten(outputs)
        own = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        losses = [task.loss(outputs, batch)]
        for head, path in zip(heads, paths, strict=True):
            given = [*leaves[:place], head(values[path], leaves[place]), *leaves[place + 1 :]]
            shallow = pytree.tree_unflatten(given, tree)
            if config.weight < 1:
                losses.append((1 - config.weight) * task.loss(shallow, batch))
            if config.weight > 0:
                losses.append(config.weight * task.distance(shallow, own, batch, temperature=config.temperature))
        return torch.stack(losses).sum()

    return objective


@dataclass(frozen=True)
class _Scored:
    """The output that the loss reads: its place among the outputs, flattened, and its value for some samples."""

    place: int
    value: Tensor


@dataclass(frozen=True)
class Shape:
    """What a head is made for.

    Attributes:
        kind: ``pooled``: one row of outputs for a sample; ``position``: one for each place of a sequence; ``pixel``:
            one for each pixel, channels at axis 1.
        axis: Where the value's features are.
        features: How many they are.
        outputs: Length of a row of outputs.
    """

    kind: Literal["pooled", "position", "pixel"]
    axis: int
    features: int
    outputs: int


class Head(nn.Module):
    """Makes the model's scored output from a value inside it: a norm and two layers at each place.

    Args:
        shape: What it reads and gives.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        width = shape.features
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, shape.outputs)
        )

    def forward(self, value: Tensor, like: Tensor) -> Tensor:
        """Return an output of the shape of `like`."""
        rows = value.float().movedim(self._shape.axis, -1)
        if self._shape.kind == "pooled" and rows.ndim > 2:
            rows = rows.flatten(1, -2).mean(1)
        scores: Tensor = self.layers(rows)
        if self._shape.kind == "pixel":
            scores = functional.interpolate(scores.movedim(-1, 1), like.shape[2:], mode="bilinear")
        return scores.reshape(like.shape)


def spread(model: Model, paths: Sequence[str], *, count: int) -> list[str]:
    """Return some of the paths at even depth: the outermost module near each of the places, in order of execution.

    Args:
        model: The model.
        paths: Which can be chosen.
        count: How many, at most.
    """
    order = {node: position for position, node in enumerate(calls(model.graph))}
    nodes = {path: module_output(model, path) for path in paths}
    depth = {path: order[node] / len(order) for path, node in nodes.items()}
    chosen: dict[str, None] = {}
    for number in range(1, count + 1):
        wanted, taken = number / (count + 1), {nodes[path] for path in chosen}
        left = [path for path in paths if nodes[path] not in taken]

        def badness(path: str, wanted: float = wanted) -> tuple[bool, int, float]:
            far = abs(depth[path] - wanted)
            return far > _NEAR / (count + 1), path.count("."), far

        chosen.update(dict.fromkeys(sorted(left, key=badness)[:1]))
    return sorted(chosen, key=depth.__getitem__)


def _scored(student: Model, context: Context) -> _Scored:
    task, model = context.task, student.clone().eval()
    batch = next(iter(context.data.train.batches(fixed_batch(student) or _SAMPLES)))
    args, kwargs = task.inputs(batch)
    with torch.no_grad():
        leaves, tree = pytree.tree_flatten(model(*args, **kwargs))
    real = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim
    ]
    for place in real:
        leaves[place] = leaves[place].detach().requires_grad_()
    loss = task.loss(pytree.tree_unflatten(leaves, tree), batch)
    gradients = torch.autograd.grad(loss, [leaves[place] for place in real], allow_unused=True)
    read = [place for place, gradient in zip(real, gradients, strict=True) if gradient is not None]
    if len(read) != 1:
        raise StageError(
            f"a head gives one output of the model, and the loss reads {len(read)} of them",
            where=f"stages.{context.name}",
            hint="distil by soft_labels or born_again, which take outputs of any form",
        )
    return _Scored(read[0], leaves[read[0]].detach())


def _usable(student: Model, scored: _Scored, config: DeepSupervisionConfig, context: Context) -> dict[str, Shape]:
    """Return what a head at each path would be made for: the paths given, all of which must do, or all that do."""
    where, model = f"stages.{context.name}.at", student.clone().eval()
    batch = next(iter(context.data.train.batches(len(scored.value))))
    args, kwargs = context.task.inputs(batch)
    try:
        tapped = tap(model, config.at or tappable_paths(model))
    except ModelError as problem:
        raise StageError(problem.what, where=where, value=list(config.at), hint=problem.hint) from problem
    with torch.no_grad():
        _, values = tapped(*args, **kwargs)
    found = {path: _shape(value, module_output(model, path), scored.value) for path, value in values.items()}
    unfit = [path for path, shape in found.items() if shape is None]
    if config.at and unfit:
        raise StageError(
            "no head can make the model's output of what this module gives",
            where=where,
            value={path: tuple(values[path].shape) for path in unfit},
            hint="name modules that give features for each sample (for each place of a sequence, for each pixel)",
        )
    usable = {path: shape for path, shape in found.items() if shape is not None}
    if not usable:
        raise StageError(
            "no module of the model gives features that a head could read",
            where=where,
            hint="distil by soft_labels or born_again instead",
        )
    return usable


def _shape(value: Tensor, node: Node, scored: Tensor) -> Shape | None:
    """Return what a head from a value to the scored output is made for; None if there is no such head.

    Args:
        value: What a module gives.
        node: Where it is in the graph.
        scored: The output.
    """
    axis = channel_axis(node) if isinstance(node.meta.get("val"), Tensor) else None
    if axis is None or not value.is_floating_point() or len(value) != len(scored):
        return None
    features = value.shape[axis]
    if scored.ndim <= 2:
        return Shape("pooled", axis, features, scored.shape[1] if scored.ndim == 2 else 1)
    if scored.ndim == 3 and value.ndim == 3 and axis == 2 and value.shape[1] == scored.shape[1]:
        return Shape("position", axis, features, scored.shape[2])
    if scored.ndim == 4 and value.ndim == 4:
        return Shape("pixel", axis, features, scored.shape[1])
    return None
