"""How often a file and the graph that it was exported from predict the same class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.fields import NoClassesError

_MOST = 2**24
"""Positions that are kept: images of many labelled pixels would fill the memory."""


class Predictions:
    """The classes that a model predicts, of each sample, token or pixel that has a label.

    Args:
        task: Says where the class scores are among the model's outputs.

    Attributes:
        problem: Why there are none, where that is an error of the task's.
    """

    def __init__(self, task: Task) -> None:
        self.problem: TaskError | None = None
        self._task = task
        self._classes: list[Tensor] = []
        self._positions = 0

    def watch(self, outputs: Any, batch: Batch) -> None:
        """Take in what the model gives for a batch."""
        if self._positions >= _MOST or self.problem is not None:
            return
        try:
            scores, _ = self._task.class_scores(outputs, batch)
        except NoClassesError:
            return
        except TaskError as problem:  # the models are paid for: they are not lost by what is only told of them
            self.problem = problem
            return
        self._classes.append(scores.argmax(1).to(torch.int32))
        self._positions += len(scores)

    def agreement(self, other: Predictions) -> float | None:
        """Return the share of positions for which another model predicts the same class; None without any."""
        if not self._positions or self.problem is not None or other.problem is not None:
            return None
        same = sum(int((own == its).sum()) for own, its in zip(self._classes, other._classes, strict=True))
        return same / self._positions
