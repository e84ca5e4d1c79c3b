"""Which scores there are, and how they are taken: all of them larger where an architecture is thought better."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mil_cli.assess.scores.fisher import fisher
from mil_cli.assess.scores.grad_norm import grad_norm
from mil_cli.assess.scores.grasp import grasp
from mil_cli.assess.scores.jacov import jacov
from mil_cli.assess.scores.naswot import naswot
from mil_cli.assess.scores.size import macs, params
from mil_cli.assess.scores.snip import snip
from mil_cli.assess.scores.subject import Subject
from mil_cli.assess.scores.synflow import synflow
from mil_cli.assess.scores.zico import zico
from mil_cli.data.base import Batch
from mil_cli.errors import DataError, MilError, ModelError, did_you_mean
from mil_cli.graph.failure import summary
from mil_cli.graph.model import Model
from mil_cli.task.base import Task


@dataclass(frozen=True)
class Measure:
    """One way to score an architecture before it is trained.

    Attributes:
        function: Takes it.
        paper: Where it comes from.
        batches: How many batches it needs at least.
        labels: Whether it needs the task's loss, so labels.
    """

    function: Callable[[Subject], float]
    paper: str
    batches: int
    labels: bool


MEASURES = {
    "synflow": Measure(synflow, "Tanaka et al. 2020, arXiv:2006.05467", batches=1, labels=False),
    "naswot": Measure(naswot, "Mellor et al. 2021, arXiv:2006.04647", batches=1, labels=False),
    "jacov": Measure(jacov, "Mellor et al. 2020, arXiv:2006.04647v1", batches=1, labels=False),
    "snip": Measure(snip, "Lee et al. 2019, arXiv:1810.02340", batches=1, labels=True),
    "grasp": Measure(grasp, "Wang et al. 2020, arXiv:2002.07376", batches=1, labels=True),
    "grad_norm": Measure(grad_norm, "Abdelfattah et al. 2021, arXiv:2101.08134", batches=1, labels=True),
    "fisher": Measure(fisher, "Turner et al. 2020, arXiv:1906.04113", batches=1, labels=True),
    "zico": Measure(zico, "Li et al. 2023, arXiv:2301.11300", batches=2, labels=True),
    "macs": Measure(macs, "a baseline: size alone", batches=0, labels=False),
    "params": Measure(params, "a baseline: size alone", batches=0, labels=False),
}
"""Name -> how it is taken."""

SIZES = ("macs", "params")
"""Those that say how large an architecture is, and nothing else."""


@dataclass(frozen=True)
class Score:
    """What one measure says of an architecture.

    Attributes:
        value: Larger is better; NaN or infinite where that is what comes out.
        seconds: How long it took. What several measures share (a copy of the model, gradients) counts for the first.
        cpu_seconds: Processor time of this process, over all its threads.
    """

    value: float
    seconds: float
    cpu_seconds: float


def score(
    model: Model,
    names: Sequence[str],
    *,
    task: Task,
    batches: Sequence[Batch],
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Score]:
    """Score an architecture as it is, with its present weights: those that training would begin with.

    Args:
        model: The architecture; it is not changed.
        names: Which measures, of `MEASURES`.
        task: Gives inputs and loss.
        batches: Batches of training samples, on the model's device. All measures but `zico` look at the first alone.
        seed: What dropout draws from.
        clock: Gives seconds.
        cpu_clock: Gives seconds of processor time.

    Returns:
        The score by name, in the order of `names`.

    Raises:
        MilError: There is no measure of that name.
        DataError: There are fewer batches than a measure needs.
        ModelError: A measure cannot be taken of this model.
        TaskError: The task has no loss for these outputs and batches.
    """
    for name in names:
        _check(name, len(batches))
    subject = Subject(model, task, batches, seed=seed)
    found = {}
    for name in names:
        began, worked = clock(), cpu_clock()
        value = _take(name, subject)
        found[name] = Score(value, seconds=clock() - began, cpu_seconds=cpu_clock() - worked)
    return found


def _check(name: str, batches: int) -> None:
    if name not in MEASURES:
        raise MilError("there is no score of this name", value=name, hint=did_you_mean(name, MEASURES))
    needed = MEASURES[name].batches
    if batches < needed:
        raise DataError(
            f"the score {name} needs at least {needed} batch{'es' if needed > 1 else ''}",
            value=batches,
            hint="give more training samples, or smaller batches",
        )


def _take(name: str, subject: Subject) -> float:
    try:
        return MEASURES[name].function(subject)
    except MilError as problem:
        problem.where = problem.where or f"score {name}"
        raise
    except RuntimeError as problem:  # an operator without a derivative, a batch that does not fit
        raise ModelError(
            f"it cannot be taken of this model: {summary(problem)}",
            where=f"score {name}",
            hint="leave this score out; `macs` and `params` can be counted of any model",
        ) from problem
