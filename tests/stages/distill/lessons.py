"""Lessons for tests of distillation, without a training around them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mil_cli.graph.model import Model
from mil_cli.stages.distill.distil import Lesson
from mil_cli.stages.distill.teacher import Teacher
from mil_cli.task.base import Task
from mil_cli.task.classification import Classification
from tests.stages.contexts import running


def lesson_of(*teachers: Model, task: Task | None = None, tapped: Mapping[str, Tensor] | None = None) -> Lesson:
    """Return the lesson of some teachers at the first step of a training.

    Args:
        teachers: The teachers.
        task: Classification if None.
        tapped: The student's values at its taps.
    """
    task = task or Classification()
    under_way = running(teachers[0], tapped=lambda: tapped or {})
    return Lesson(task, under_way, [Teacher(teacher, task, under_way) for teacher in teachers])
