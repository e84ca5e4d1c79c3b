"""Builds the task that a recipe names: a built-in one, or a user's own class, filled up where it leaves things out."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric

from mil_cli.data.base import Batch, batch_length
from mil_cli.errors import MilError, TaskError
from mil_cli.models.user_code import call_target, source_line, source_sha256
from mil_cli.task.averaging import weighted_mean_of_all
from mil_cli.task.base import Task
from mil_cli.task.divergence import check_same_shape
from mil_cli.task.fields import model_inputs, no_class_scores, target_entry


def build_task(config: Mapping[str, Any], root: Path) -> Task:
    """Build the task of a recipe.

    A user's own class needs only ``loss(outputs, batch)``. What else it may have: ``score(outputs, batch)``, a mean
    figure of a batch that makes the metric (else the loss is the metric), or `metric` and `update` as in `Task`;
    `metric_name`; `higher_is_better`; `inputs`; `distance`; `class_scores`; `combine`.

    Args:
        config: ``_target_`` and its arguments.
        root: The recipe's folder.

    Raises:
        TaskError: Nothing of that name, wrong arguments, or no loss.
    """
    made = call_target(config, root=root, where="task", error=TaskError)
    if isinstance(made, Task):
        return made
    if not callable(getattr(made, "loss", None)):
        raise TaskError(
            "a task needs a method loss(self, outputs, batch)",
            where="task._target_",
            value=config["_target_"],
            hint="add it, or use a built-in task (mil list tasks)",
        )
    return UserTask(made, settings=config)


class UserTask:
    """A user's own task with what it leaves out filled in.

    Args:
        own: The user's object; has at least ``loss(outputs, batch)``.
        settings: What it was built from, for the fingerprint.

    Raises:
        TaskError: `metric` without `update` or the other way round.
    """

    def __init__(self, own: Any, *, settings: Mapping[str, Any]) -> None:
        self._own = own
        self._settings = settings
        has_metric, has_update = hasattr(own, "metric"), hasattr(own, "update")
        if has_metric != has_update:
            raise TaskError(
                "metric() and update(metric, outputs, batch) belong together",
                where="task._target_",
                value=type(own).__name__,
                hint="give both, or only score(outputs, batch)",
            )
        self._has_metric = has_metric
        self._has_score = callable(getattr(own, "score", None))

    @property
    def name(self) -> str:
        """What reports call the task."""
        return str(getattr(self._own, "name", type(self._own).__name__))

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        default = "metric" if self._has_metric else "score" if self._has_score else "loss"
        return str(getattr(self._own, "metric_name", default))

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better: as the user says; by default for a score or metric, not for a loss."""
        return bool(getattr(self._own, "higher_is_better", self._has_metric or self._has_score))

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments: the user's choice, else all entries but the target."""
        if not hasattr(self._own, "inputs"):
            return model_inputs(batch, None, without=[target_entry(batch, None)])
        made = self._ask("inputs", batch)
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict):
            return made
        if isinstance(made, torch.Tensor):
            return (made,), {}
        if isinstance(made, Mapping):
            return (), dict(made)
        if isinstance(made, tuple | list):
            return tuple(made), {}
        raise TaskError(
            "inputs(batch) must return the model's arguments: a tensor, a tuple, a dict, or (args, kwargs)",
            where="task.inputs",
            value=type(made).__name__,
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the user's loss.

        Raises:
            TaskError: It is not a scalar tensor.
        """
        loss = self._ask("loss", outputs, batch)
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            raise TaskError(
                "loss(outputs, batch) must return a scalar tensor",
                where="task.loss",
                value=tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__,
                hint="take the mean over the batch",
            )
        return loss

    def metric(self) -> Metric:
        """Return a fresh metric: the user's, else a mean of score or loss over samples."""
        if self._has_metric:
            made = self._ask("metric")
            if not isinstance(made, Metric):
                raise TaskError(
                    "metric() must return a torchmetrics.Metric", where="task.metric", value=type(made).__name__
                )
            return made
        return MeanMetric(nan_strategy="disable")

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch."""
        if self._has_metric:
            self._ask("update", metric, outputs, batch)
            return
        value = self._ask("score", outputs, batch) if self._has_score else self.loss(outputs, batch)
        samples = batch_length(batch)
        try:
            # One value per sample: MeanMetric drops weights where it does not look for NaN.
            values = torch.as_tensor(value, dtype=torch.float32).expand(samples)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise TaskError(
                f"score(outputs, batch) must return one number, or one for each of the {samples} samples: {problem}",
                where="task.score",
                value=tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__,
            ) from problem
        metric.update(values)

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return the user's distance, else the mean squared difference of all real outputs."""
        if hasattr(self._own, "distance"):
            made = self._ask("distance", student_outputs, teacher_outputs, batch, temperature=temperature)
            return torch.as_tensor(made)
        students, teachers = tree_leaves(student_outputs), tree_leaves(teacher_outputs)
        terms: list[torch.Tensor] = []
        for student, teacher in zip(students, teachers, strict=False):
            if isinstance(student, torch.Tensor) and student.is_floating_point():
                check_same_shape(student, teacher)
                terms.append(functional.mse_loss(student, teacher))
        if not terms or len(students) != len(teachers):
            raise TaskError(
                "the outputs of model and teacher cannot be compared",
                where="teacher",
                value=(len(students), len(teachers)),
                hint="define distance(student_outputs, teacher_outputs, batch, *, temperature) in the task's class",
            )
        return torch.stack(terms).mean()

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the user's class scores and labels.

        Raises:
            TaskError: The user's class gives none, or something else.
        """
        if not hasattr(self._own, "class_scores"):
            raise no_class_scores(self.name, "its class has no method class_scores(outputs, batch)")
        match self._ask("class_scores", outputs, batch):
            case (torch.Tensor(ndim=2) as scores, torch.Tensor() as labels) if labels.shape == scores.shape[:1]:
                return scores, labels
        raise TaskError(
            "class_scores gives something else than scores (positions, classes) and labels (positions,)", where="task"
        )

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return the user's combination, else the weighted mean of all real outputs."""
        if hasattr(self._own, "combine"):
            return self._ask("combine", outputs, weights, temperature=temperature)
        return weighted_mean_of_all(outputs, weights)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Return what a method of the user's gives.

        Raises:
            TaskError: It raises something else than a `MilError`; the line is given.
        """
        try:
            return getattr(self._own, method)(*arguments, **named)
        except MilError:
            raise
        except Exception as problem:
            file = inspect.getsourcefile(type(self._own))
            line = source_line(problem, None if file is None else Path(file).parent)
            raise TaskError(
                f"{method} failed: {type(problem).__name__}: {problem}",
                where=f"task.{method}",
                hint=f"raised at {line}" if line else None,
            ) from problem

    def fingerprint(self) -> str:
        """Return the SHA-256 of the class's source, what it imports beside it, and the settings; or the user's own."""
        if hasattr(self._own, "fingerprint"):
            return str(self._own.fingerprint())
        settings = json.dumps(self._settings, sort_keys=True, default=repr)
        return hashlib.sha256(f"{source_sha256(type(self._own))} {settings}".encode()).hexdigest()
