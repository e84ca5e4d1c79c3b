"""What the methods share that set single weights to zero: which ones may go, in which pattern, and what is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.judging import with_fresh_statistics
from mil_cli.stages.prune.masks import insert_masks, settle_masks
from mil_cli.stages.prune.skipping import check_patterns, skipped
from mil_cli.stages.registry import METHODS, StageConfig

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LAYERS = ("linear", *CONVOLUTIONS)

_PATTERN = re.compile(r"^([1-9]\d?):([1-9]\d?)$")


def _checked(value: object) -> object:
    found = _PATTERN.match(value) if isinstance(value, str) else None
    if value is not None and (found is None or int(found.group(1)) >= int(found.group(2))):
        # YAML reads 2:4 without quotes as a number
        raise ValueError(f'{value!r} is no pattern; write how many of how many are kept, in quotes, such as "2:4"')
    return value


class SparsityConfig(StageConfig):
    """Settings of a method that sets single weights to zero; shapes stay.

    Attributes:
        sparsity: Share of each layer's weights that become zero.
        pattern: How many of how many neighbours along the inputs are kept, such as ``"2:4"``, in place of `sparsity`;
            layers whose inputs do not divide by it stay dense.
        smallest: Weights with fewer numbers stay dense.
        skip: Names of weights to leave dense, or patterns with ``*``.
        recover: Key of a train or distill stage that the sparse model is trained by, its zeros held; None: the task's
            loss.
        trainer: Trainer settings for that, over that stage's own.
        train: Whether that training takes place.
        recalibrate_samples: Training samples from which batch norms take their statistics anew where none does; 0
            leaves them.
    """

    family: ClassVar[str] = "prune"
    never_after: ClassVar[dict[str, str]] = {"quantize": "codes would be trained, and zeros with them"}
    never_before: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            (
                "train",
                "distill",
                "nas",
                *(f"quantize/{name}" for name in ("lsq", "lsq_plus", "pact", "dorefa", "apot")),
            ),
            "its training would fill the zeros again; name the stage to train by under `recover` of the sparse one",
        ),
        **{
            f"{family}/{method}": "it would choose anew, or train, what is zero"
            for family, method in METHODS
            if family == "prune" and method != "kmeans"
        },
    }

    sparsity: float = Field(0.5, gt=0, lt=1)
    pattern: Annotated[str | None, BeforeValidator(_checked)] = None
    smallest: int = Field(512, ge=0)
    skip: tuple[str, ...] = ()
    recover: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)
    train: bool = True
    recalibrate_samples: int = Field(512, ge=0)

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """The pattern as numbers."""
        return None if self.pattern is None else tuple(int(part) for part in self.pattern.split(":"))  # type: ignore[return-value]


def sparse_layers(
    graph: GraphModule,
    config: SparsityConfig,
    context: Context,
    *,
    wanted: Callable[[Node], bool] = lambda node: True,
) -> dict[str, Node]:
    """Return by name of its weight each layer that may become sparse, in the order in which they run.

    Args:
        graph: The graph.
        config: The settings.
        context: Names the stage in errors.
        wanted: Says no to layers that the method cannot handle.

    Raises:
        StageError: There is none, or a pattern of `skip` fits none.
    """
    found: dict[str, Node] = {}
    names: list[str] = []
    for node in calls(graph):
        source = get_argument(node, "weight") if op_name(node) in LAYERS else None
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        name, weight = str(source.target), get_attribute(graph, str(source.target))
        names.append(name)
        divides = config.kept_of is None or weight.shape[1] % config.kept_of[1] == 0
        large = weight.numel() >= config.smallest
        if divides and large and not skipped(name, config.skip) and wanted(node):
            found.setdefault(name, node)
    check_patterns(config.skip, names, where=f"stages.{context.name}")
    if not found:
        hint = "lower smallest, skip less, or take another pattern"
        raise StageError("no layer of the model can become sparse", where=f"stages.{context.name}", hint=hint)
    return found


def keep_largest(scores: Tensor, sparsity: float, kept_of: tuple[int, int] | None, *, by_row: bool = False) -> Tensor:
    """Return which weights stay, bool.

    Args:
        scores: Importance, shaped like the weight: ``[outputs, inputs, ...]``.
        sparsity: Share that goes: of the whole weight, or of each output's.
        kept_of: ``(n, m)``: the n largest of each m neighbours along the inputs, in place of a share.
        by_row: Whether each output loses the same share.
    """
    if kept_of is not None:
        kept, of = kept_of
        along = scores.movedim(1, -1)
        groups = along.reshape(*along.shape[:-1], -1, of)
        places = groups.topk(kept, dim=-1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
        return mask.reshape(along.shape).movedim(-1, 1)
    rows = scores.reshape(len(scores), -1) if by_row else scores.reshape(1, -1)
    lost = min(round(sparsity * rows.shape[1]), rows.shape[1] - 1)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.argsort(dim=1, stable=True)[:, :lost], False)
    return mask.reshape(scores.shape)


def used_once(graph: GraphModule, node: Node) -> bool:
    """Whether only one layer reads the weight of a layer."""
    weight = get_attribute(graph, str(get_argument(node, "weight").target))
    readers = [
        user
        for source in graph.graph.find_nodes(op="get_attr")
        if get_attribute(graph, str(source.target)) is weight
        for user in source.users
    ]
    return readers == [node]


def finish(
    sparse: Model,
    masks: Mapping[str, Tensor],
    config: SparsityConfig,
    context: Context,
    *,
    steer: Callable[[Mapping[str, str]], StepHook] | None = None,
    complete: Callable[[Model, Mapping[str, str]], None] | None = None,
) -> Model:
    """Set a model's zeros, train it with these held, if the settings say so, and note what came of it.

    Args:
        sparse: The model; changed.
        masks: By name of a weight: which of its numbers stay, bool; at first, where the training is steered.
        config: The settings.
        context: Gives data, training and checkpoints.
        steer: Given the names of the masks by those of their weights, returns what changes the masks before each step.
        complete: Changes the masks of the trained model, by the same names, once more.

    Returns:
        The model, in evaluation mode.
    """
    paths = insert_masks(sparse.graph, masks)
    if config.train:
        # the best on val would be those that have the fewest zeros, where these grow
        trainer = {**config.trainer, **({} if steer is None else {"early_stopping": None})}
        hook = None if steer is None else steer(paths)
        sparse = context.finetune(sparse, stage=config.recover, name="sparse", trainer=trainer, before_step=hook)
        if complete is not None:
            complete(sparse, paths)
    settle_masks(sparse.graph, paths)
    if not config.train:
        sparse = with_fresh_statistics(sparse, context, samples=config.recalibrate_samples)
    note_sparsity(sparse, masks, config, context)
    return sparse.eval()


def note_sparsity(model: Model, names: Collection[str], config: SparsityConfig, context: Context) -> None:
    """Note how many weights are zero, and what a runtime makes of that."""
    weights = [get_attribute(model.graph, name) for name in names]
    zeros, numbers = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    context.note(
        sparsity=zeros / numbers,
        zeros=zeros,
        sparse_layers=sorted(names),
        gain="fewer bytes where the file is zipped; no time: processors' kernels multiply by zeros too",
    )
