"""Searches that mix the operators of a space and learn by gradients how strong each is; what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from mil_cli.data.base import batch_count, halves
from mil_cli.errors import StageError
from mil_cli.spaces.cost import CostCounter
from mil_cli.stages.nas.designed import DesignedConfig
from mil_cli.stages.nas.shared import SharedModule
from mil_cli.stages.nas.stability import too_many_skips, too_sharp
from mil_cli.stages.nas.strengths import Strengths, Weights, count_skips, derive, operator_decisions
from mil_cli.stages.recovery import RecoveringConfig
from mil_cli.training.layout import place

if TYPE_CHECKING:
    from mil_cli.data.base import Batch, Split
    from mil_cli.graph.model import Model
    from mil_cli.graph.spec import ModelSpec
    from mil_cli.spaces import Architecture, Choice, DesignedSpace
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.eager import Samples
    from mil_cli.training.objective import Binding, Objective, Running


_POOLS = (_AvgPoolNd, _MaxPoolNd)

_DIGITS = 4
"""Of weights in the report."""


class RelaxedConfig(DesignedConfig, RecoveringConfig):
    """Settings that all differentiable searches have.

    Attributes:
        trainer: Overrides of the recipe's trainer settings, for the search.
        strength_learning_rate: Of the strengths of operators (Adam). They move by at most about so much a step: a
            search of few steps needs more.
        strength_weight_decay: Of the strengths.
        frozen: Share of the search in which only weights learn.
        edges: How many edges into a node the architecture keeps, if the others can be nothing; None keeps all.
        max_skips: The search ends, with the strengths of the epoch before, when the architecture that it stands for
            comes to have more skips; None: it does not.
        max_eigenvalue_growth: The search ends, with strengths from before, when the largest eigenvalue of the Hessian
            of their loss grows to more than so many times what it was; the paper has 1.3. None: it does not.
        eigenvalue_window: So many epochs that value is averaged over; it is held against the average of one fewer
            epochs before. The paper's 5 need a search of nine epochs and more.
        skip_dropout: Share of what skips give that is dropped at the beginning, falling to none at the end.
        recover: Key of a train or distill stage of the recipe that trains the architecture found; None leaves it with
            fresh weights.
    """

    trainer: dict[str, Any] = Field(default_factory=dict)
    strength_learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    strength_weight_decay: float = Field(1e-3, ge=0, allow_inf_nan=False)
    frozen: float = Field(0.0, ge=0, lt=1)
    edges: int | None = Field(2, ge=1)
    max_skips: int | None = Field(None, ge=0)
    max_eigenvalue_growth: float | None = Field(None, gt=0, allow_inf_nan=False)
    eigenvalue_window: int = Field(5, ge=3)
    skip_dropout: float = Field(0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """How strengths become weights of a mixture.

    Attributes:
        apart: Whether each operator has a weight of its own; see `Strengths`.
        edges: Whether edges have strengths; see `Strengths`.
        share: One of so many channels passes through the operators; see `mil_cli.spaces.Choice`.
        penalty: Added to the loss that strengths are trained on.
        threshold: Edges of smaller weights pass nothing on in the end; see `derive`.
    """

    apart: bool = False
    edges: bool = False
    share: int = 1
    penalty: Callable[[Weights], Tensor] | None = None
    threshold: float = 0.0


def search_relaxed(model: Model, config: RelaxedConfig, relaxation: Relaxation, context: Context) -> Model:
    """Train a mixture of all operators and its strengths, each on a half of train; return the architecture they show.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        relaxation: How operators are mixed.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Raises:
        ModelError: An operator does not run on the model's inputs.
        StageError: The recipe's model holds no choice between operators that can be mixed so.
    """
    mixture = Mixture.beside(model, context.space())
    space = mixture.space
    _check(space, context)
    CostCounter(space, *model.batch_input(1)).check()
    settle_norms(space)
    normalise_pools(space)
    strengths = Strengths(
        space,
        generator=context.generator("strengths"),
        learning_rate=config.strength_learning_rate,
        weight_decay=config.strength_weight_decay,
        apart=relaxation.apart,
        edges=relaxation.edges,
    )
    with space.mixed(strengths.weights(), share=relaxation.share):
        pass  # what cannot be mixed so is told now
    settings = context.trainer(config.trainer).judged_at_the_end()
    own, other = halves(context.data.train, seed=context.seed)
    batch_size = model.spec.fixed_batch or settings.batch_size

    def shown(weights: Weights) -> Architecture:
        return derive(space, weights, edges=config.edges, threshold=relaxation.threshold)

    def watch(running: Running[Mixture]) -> str | None:
        growth, skips, reason = config.max_eigenvalue_growth, config.max_skips, None
        if growth is None:
            strengths.record()
        else:
            batch = next(endless(other, batch_size=batch_size, seed=context.seed, start=0))
            strengths.record(mixed_loss(running, context.task, relaxation, batch))
            reason = too_sharp(strengths, growth, window=config.eigenvalue_window)
        if reason is None and skips is not None:
            reason = too_many_skips(strengths, lambda weights: count_skips(space, shown(weights)), skips)
        return reason

    bind = relaxing(
        context.task,
        strengths,
        relaxation,
        other,
        batch_size=batch_size,
        frozen=config.frozen,
        skip_dropout=config.skip_dropout,
        seed=context.seed,
    )
    result = context.train(
        mixture,
        settings=settings,
        doing="training all operators at once",
        slot="mixture",
        bind=bind,
        companions=strengths,
        stop=watch,
        data=context.with_train(own),
    )
    architecture = shown(strengths.weights())
    context.note(
        history=result.history,
        stopped=result.stopped,
        architecture=architecture.to_json(),
        skips=count_skips(space, architecture),
        weights=[_named(space, weights) for weights in strengths.history],
        eigenvalues=strengths.eigenvalues,
    )
    found = context.capture(context.space().build(architecture, seed=context.seed))
    return config.recovered(found, context, name="winner")


class Mixture(SharedModule):
    """A space's module that runs all operators at once, in training and in evaluation; the rest is as large as can be.

    Args:
        module: The module, which holds choices.
        spec: What each of its architectures takes and gives.
        samples: Example ``(args, kwargs)``.
    """

    def __init__(self, module: nn.Module, *, spec: ModelSpec, samples: Samples) -> None:
        super().__init__(module, spec=spec, samples=samples)
        self.graph = _Mixes(self.space)

    def mix(self, weigh: Callable[[], Mapping[str, Tensor]], *, share: int) -> None:
        """Make each forward pass run operators with the weights that `weigh` gives then, on a share of the channels."""
        self.graph.weigh, self.graph.share = weigh, share  # type: ignore[assignment]


class _Mixes(nn.Module):
    """Runs a space with all operators mixed; until it is told how, the largest architecture."""

    def __init__(self, space: DesignedSpace) -> None:
        super().__init__()
        self.module = space.module
        self._space = space
        self.weigh: Callable[[], Mapping[str, Tensor]] = dict
        self.share = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._space.active(self._space.largest), self._space.mixed(self.weigh(), share=self.share):
            return self.module(*args, **kwargs)


def relaxing(
    task: Task,
    strengths: Strengths,
    relaxation: Relaxation,
    split: Split,
    *,
    batch_size: int,
    frozen: float,
    skip_dropout: float,
    seed: int,
) -> Binding[Mixture]:
    """Return the objective of a mixture: before each step of its weights, its strengths take one on other samples.

    Args:
        task: Gives inputs and loss.
        strengths: What is trained beside the weights; a companion of the training.
        relaxation: How operators are mixed.
        split: What strengths are trained on.
        batch_size: Samples of a step of theirs.
        frozen: Share of the steps in which they stay as they are.
        skip_dropout: Share of what skips give that is dropped at the beginning, falling to none at the end.
        seed: Of the order and the augmentation of `split`.
    """

    def bind(running: Running[Mixture]) -> Objective:
        mixture, steps = running.model, running.steps
        batches: Iterator[Batch] | None = None

        def weigh() -> Weights:
            nonlocal batches
            if mixture.training and steps() >= frozen * running.total_steps:
                if batches is None:
                    batches = endless(split, batch_size=batch_size, seed=seed, start=steps())
                strengths.step(mixed_loss(running, task, relaxation, next(batches)))
            return strengths.weights()

        if skip_dropout:
            drop_skips(mixture.space, lambda: skip_dropout * (1 - steps() / running.total_steps))
        mixture.mix(weigh, share=relaxation.share)
        return task.loss

    return bind


def mixed_loss(
    running: Running[Mixture], task: Task, relaxation: Relaxation, batch: Batch
) -> Callable[[Weights], Tensor]:
    """Return the loss of a batch, by the weights of operators: the task's, with the relaxation's penalty."""
    space = running.model.space
    batch = place(batch, device=running.device, channels_last=running.channels_last)
    args, kwargs = task.inputs(batch)

    def loss(weights: Weights) -> Tensor:
        with space.active(space.largest), space.mixed(weights, share=relaxation.share):
            value = task.loss(running.forward(space.module, *args, **kwargs), batch)
        return value if relaxation.penalty is None else value + relaxation.penalty(weights)

    return loss


def endless(split: Split, *, batch_size: int, seed: int, start: int) -> Iterator[Batch]:
    """Yield augmented batches of a split, pass after pass, as a training that has used so many would meet them next."""
    drop_last = len(split) >= batch_size
    epoch, skip = divmod(start, batch_count(len(split), batch_size, drop_last=drop_last))
    while True:
        yield from split.batches(
            batch_size, shuffle=True, augment=True, seed=seed, epoch=epoch, drop_last=drop_last, skip=skip
        )
        epoch, skip = epoch + 1, 0


def drop_skips(space: DesignedSpace, rate: Callable[[], float]) -> None:
    """Drop a share of what the skips of a space give while it is trained.

    Chen et al. 2019, "Progressive Differentiable Architecture Search" (arXiv:1904.12760), section 3.3: else strengths
    come to favour skips, through which gradients pass best.

    Args:
        space: The space; its modules get hooks.
        rate: Gives the share of the moment.
    """

    def drop(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return functional.dropout(output, rate(), training=module.training)

    for skip in {part for choice in _choices(space) for part in choice.children() if isinstance(part, nn.Identity)}:
        skip.register_forward_hook(drop)


def settle_norms(space: DesignedSpace) -> None:
    """Leave the scales and shifts of batch norms in operators as they are: they would rescale what strengths weigh."""
    for choice in _choices(space):
        for part in choice.modules():
            if isinstance(part, _BatchNorm):
                for parameter in part.parameters(recurse=False):
                    parameter.requires_grad_(False)


def normalise_pools(space: DesignedSpace) -> None:
    """Bring what pooling operators give to mean 0 and variance 1 by channel, as the authors' code does in the search.

    Convolutions have norms of their own; without any, pooling is strong by its magnitude alone. An architecture that is
    built has none there.

    Args:
        space: The space; its modules get hooks.
    """

    def normalise(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return functional.batch_norm(output, None, None, training=True)

    for pool in {part for choice in _choices(space) for part in choice.modules() if isinstance(part, _POOLS)}:
        pool.register_forward_hook(normalise)


def _choices(space: DesignedSpace) -> list[Choice]:
    return [choice for decision in operator_decisions(space) for choice in space.choices_of(decision)]


def _check(space: DesignedSpace, context: Context) -> None:
    """Refuse a space that holds no operators to mix.

    Raises:
        StageError: It does not.
    """
    if not operator_decisions(space):
        raise StageError(
            "there are no operators to mix: the model holds no Choice",
            where=f"stages.{context.name}",
            value=type(space.module).__name__,
            hint="search widths, depths and kernels by another method of nas",
        )


def _named(space: DesignedSpace, weights: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    names = {one.name: one.choices for one in operator_decisions(space)}
    return {
        name: {str(choice): round(weight, _DIGITS) for choice, weight in zip(names[name], vector, strict=True)}
        for name, vector in weights.items()
    }
