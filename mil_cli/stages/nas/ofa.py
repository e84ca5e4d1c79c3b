"""A supernet that first is one large net and then lets go of kernels, depths and widths in turn; then a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from mil_cli.spaces import OneOf, Repeat
from mil_cli.spaces.reorder import reorder_channels
from mil_cli.spaces.sizes import Kernel
from mil_cli.stages.nas.one_shot import OneShotConfig, search_shared, train_shared
from mil_cli.stages.nas.shared import SharedModule, forward, step_generator
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.spaces import Architecture, DesignedSpace
    from mil_cli.spaces.decisions import Decision
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Binding, Objective, Running

Phase = Literal["operators", "kernels", "depths", "widths"]


class OfaConfig(OneShotConfig):
    """Settings of ``nas/ofa``, beside those of all one-shot searches.

    Attributes:
        phases: What is let go of in turn, each time for good; what is not named stays as large as it is.
        reorder: Whether channels are put in the order of their weights before widths are let go of, so that smaller
            nets keep the ones that matter.
        phase_trainer: Overrides of `trainer` for each phase; after the first training of the largest net they are
            fine-tunings, with a learning rate a tenth or less of its own.
        paths: Architectures that each step trains.
        temperature: By which class scores are divided where architectures learn from the largest net.
        distill: Weight of what the largest net gives beside the labels.
        inherit: Whether the winner keeps its shared weights; see `OneShotConfig`.
    """

    method: ClassVar[str] = "ofa"
    version: ClassVar[int] = 2

    phases: tuple[Phase, ...] = Field(("operators", "kernels", "depths", "widths"), min_length=1)
    reorder: bool = True
    phase_trainer: dict[str, Any] = Field(default_factory=dict)
    paths: int = Field(2, ge=1, le=16)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    distill: float = Field(1.0, ge=0, allow_inf_nan=False)
    inherit: bool = True

    def shared(self, model: Model, context: Context) -> SharedModule:
        """Return weights that were trained as one net first and then phase by phase."""
        task = context.task
        shared = train_shared(model, self, context, lambda running: task.loss, doing="training the largest net")
        teacher = shared.clone().eval()
        for number, phase in enumerate(self.phases):
            if not _of(shared.space, (phase,)):
                continue
            if phase == "widths" and self.reorder:
                args, kwargs = model.samples
                context.note(reordered=len(reorder_channels(shared.space, args, kwargs)))
            bind = shrinking(
                task,
                free=self.phases[: number + 1],
                teacher=teacher,
                paths=self.paths,
                temperature=self.temperature,
                distill=self.distill,
                seed=context.seed,
            )
            doing = f"letting {phase} go"
            shared = train_shared(
                model, self, context, bind, start=shared, overrides=self.phase_trainer, doing=doing, slot=phase
            )
        return shared


@stage(OfaConfig)
def ofa(model: Model, config: OfaConfig, context: Context) -> Model:
    """Return the best architecture within the bounds of a supernet that shrank progressively.

    Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (arXiv:1908.09791):
    the largest architecture is trained first, then teaches smaller ones while one kind of decision after another is
    let go of. A smaller kernel is the centre of the largest, mapped by a learned matrix where the space's kernels say
    ``transformed``, as in the paper; a smaller width is the first channels, put in the order of their weights before.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice, or no architecture is within the bounds.
    """
    return search_shared(model, config, context)


def shrinking(
    task: Task,
    *,
    free: tuple[Phase, ...],
    teacher: SharedModule,
    paths: int,
    temperature: float,
    distill: float,
    seed: int,
) -> Binding[SharedModule]:
    """Return the objective of one phase: some architectures a step learn the labels and what the largest net gave.

    Args:
        task: Gives inputs, loss and distance.
        free: The kinds of decisions that are drawn; the others are as large as they can be.
        teacher: The largest net as it was trained, in evaluation mode.
        paths: Architectures of a step; their losses are averaged.
        temperature: Softens class scores.
        distill: Weight of the distance to the teacher.
        seed: Of the architectures.
    """

    def bind(running: Running[SharedModule]) -> Objective:
        space = running.model.space
        draw = partly(space, free)
        drawn: list[Architecture] = []
        teaching = teacher.graph.to(running.device)

        def first() -> Architecture:
            generator = step_generator(seed, running.steps())
            drawn[:] = [draw(generator) for _ in range(paths)]
            return drawn[0]

        def objective(outputs: Any, batch: Batch) -> torch.Tensor:
            args, kwargs = task.inputs(batch)
            with torch.no_grad():
                targets = running.forward(teaching, *args, **kwargs)
            total = torch.zeros((), device=running.device)
            for number, architecture in enumerate(drawn):
                given = forward(running, architecture, task, batch) if number else outputs
                total = total + task.loss(given, batch)
                if distill:
                    total = total + distill * task.distance(given, targets, batch, temperature=temperature)
            return total / len(drawn)

        running.model.run(first)
        return objective

    return bind


def partly(space: DesignedSpace, free: tuple[Phase, ...]) -> Callable[[torch.Generator], Architecture]:
    """Return what draws architectures in which only some kinds of decisions differ from the largest one."""
    drawn = _of(space, free)

    def draw(generator: torch.Generator) -> Architecture:
        chosen = list(space.largest_choices)
        for number in sorted(drawn):
            chosen[number] = int(torch.randint(len(space.decisions[number].choices), (), generator=generator))
        return space.at(chosen)

    return draw


def _of(space: DesignedSpace, phases: tuple[Phase, ...]) -> set[int]:
    """Return the numbers of the decisions of some kinds."""
    return {number for number, decision in enumerate(space.decisions) if _phase(decision) in phases}


def _phase(decision: Decision) -> Phase:
    match decision.holder:
        case OneOf():
            return "operators"
        case Repeat():
            return "depths"
        case Kernel():
            return "kernels"
    return "widths"
