"""Quality of a model on a split: the same for a torch graph and for an exported file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mil_cli.data.base import Split, batch_length
from mil_cli.errors import TaskError
from mil_cli.graph.model import Model
from mil_cli.task.base import Task

_SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A figure of quality.

    Attributes:
        metric: Its name.
        value: Its value; shares are in [0, 1].
        higher_is_better: Whether more is better.
        samples: Samples that it was taken on.
        split: The split: train, val or test.
    """

    metric: str
    value: float
    higher_is_better: bool
    samples: int
    split: str

    def better_than(self, other: Quality | None) -> bool:
        """Whether this value is strictly better than another; anything is better than none."""
        if other is None:
            return True
        return self.value > other.value if self.higher_is_better else self.value < other.value


class NotFiniteError(TaskError):
    """A model whose outputs hold NaN or infinities."""


def evaluate(
    predict: Callable[..., Any],
    *,
    task: Task,
    split: Split,
    split_name: str,
    batch_size: int = 256,
    limit: int | None = None,
) -> Quality:
    """Score a model.

    Args:
        predict: Called with the arguments of `Task.inputs`; a `Model` is scored in evaluation mode and left in the mode
            that it was in.
        task: Gives inputs and metric.
        split: The samples.
        split_name: Its name, for the figure.
        batch_size: Samples per call; a `Model` with a fixed batch is called with that,
            and a last batch that is not full is left out.
        limit: Score this many samples, drawn at random, always the same ones; None: all.

    Raises:
        NotFiniteError: The outputs hold NaN or infinities.
        TaskError: The outputs do not fit the task.
    """
    model = predict if isinstance(predict, Model) else None
    was_training = model is not None and model.training
    fixed = fixed_batch(model) if model is not None else None
    if model is not None:
        model.eval()
    try:
        return _evaluate(predict, task, split, split_name, fixed or batch_size, limit, drop_last=fixed is not None)
    finally:
        if model is not None and was_training:
            model.train()


def fixed_batch(model: Model) -> int | None:
    """Return the batch size that a model is fixed to, or None if it takes any."""
    if model.spec.batch is not None or not model.spec.inputs or not model.spec.inputs[0].shape:
        return None
    return model.spec.inputs[0].shape[0]


def _evaluate(
    predict: Callable[..., Any],
    task: Task,
    split: Split,
    split_name: str,
    batch_size: int,
    limit: int | None,
    *,
    drop_last: bool,
) -> Quality:
    metric = task.metric()
    finite: torch.Tensor | None = None
    samples = 0
    drawn = limit is not None and limit < len(split)
    with torch.no_grad():
        for batch in split.batches(batch_size, shuffle=drawn, seed=_SAMPLE_SEED, drop_last=drop_last):
            args, kwargs = task.inputs(batch)
            outputs = predict(*args, **kwargs)
            task.update(metric, outputs, batch)
            for leaf in tree_leaves(outputs):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    # A product with 0 is 0, or NaN where a value is not finite: one pass, no mask.
                    probe = (leaf.detach() * 0).sum()
                    finite = probe if finite is None else finite + probe
            samples += batch_length(batch)
            if limit is not None and samples >= limit:
                break
        if finite is not None and not bool(finite == 0):
            raise NotFiniteError(
                f"the model's outputs on {split_name} hold NaN or infinities",
                where="task",
                hint="train with a lower learning rate or gradient clipping; check the data for extreme values",
            )
        value = float(metric.compute())
    return Quality(
        metric=task.metric_name,
        value=value,
        higher_is_better=task.higher_is_better,
        samples=samples,
        split=split_name,
    )
