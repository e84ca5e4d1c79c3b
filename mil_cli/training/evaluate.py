"""Quality of a model on a split: the same for a torch graph and for an exported file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mil_cli.data.base import Batch, Split, batch_length
from mil_cli.errors import DataError, TaskError
from mil_cli.graph.model import Model
from mil_cli.graph.spec import ModelSpec
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
    spec: ModelSpec | None = None,
    watch: Callable[[Any, Batch], None] | None = None,
) -> Quality:
    """Score a model.

    Args:
        predict: Called with the arguments of `Task.inputs`; a `Model` is scored in evaluation mode and left in the mode
            that it was in.
        task: Gives inputs and metric.
        split: The samples.
        split_name: Its name, for the figure.
        batch_size: Samples per call, where `spec` leaves them free; see `whole_batches`.
        limit: Score this many samples, drawn at random, always the same ones; None: all.
        spec: What the model takes; None: what `predict` says under that name, if anything.
        watch: Called with the outputs of each batch, and the batch.

    Raises:
        DataError: There are fewer samples than the batch is fixed to.
        NotFiniteError: The outputs hold NaN or infinities.
        TaskError: The outputs do not fit the task.
    """
    model = predict if isinstance(predict, Model) else None
    was_training = model is not None and model.training
    spec = getattr(predict, "spec", None) if spec is None else spec
    if model is not None:
        model.eval()
    try:
        return _evaluate(predict, task, split, split_name, batch_size, limit, spec, watch)
    finally:
        if model is not None and was_training:
            model.train()


def fixed_batch(model: Model) -> int | None:
    """Return the batch size that a model is fixed to, or None if it takes any."""
    return model.spec.fixed_batch


def whole_batches(
    spec: ModelSpec | None, split: Split, split_name: str, *, batch_size: int, shuffle: bool = False, seed: int = 0
) -> Iterator[Batch]:
    """Yield the batches of a split as a model takes them: where its batch is fixed, of that size and no other.

    A last batch that is not full is then left out.

    Args:
        spec: What the model takes; None: batches of any size.
        split: The samples.
        split_name: Its name, for messages.
        batch_size: Samples of a batch, where the model leaves them free.
        shuffle: As in `Split.batches`.
        seed: Likewise.

    Raises:
        DataError: The batch is fixed to more samples than there are.
    """
    fixed = None if spec is None else spec.fixed_batch
    empty = True
    for batch in split.batches(fixed or batch_size, shuffle=shuffle, seed=seed, drop_last=fixed is not None):
        empty = False
        yield batch
    if empty and fixed is not None:
        raise too_few_samples(fixed, split_name, len(split))


def too_few_samples(fixed: int, split_name: str, samples: int) -> DataError:
    """Return the error of a split that does not fill one batch of a model."""
    return DataError(
        f"the model takes batches of {fixed} only, which the samples of {split_name} do not fill",
        where=f"data.{split_name}",
        value=samples,
        hint=f"give {split_name} {fixed} samples or more, or change the model so that it can be captured with a free "
        "batch (`mil inspect` says what fixes it)",
    )


def _evaluate(
    predict: Callable[..., Any],
    task: Task,
    split: Split,
    split_name: str,
    batch_size: int,
    limit: int | None,
    spec: ModelSpec | None,
    watch: Callable[[Any, Batch], None] | None,
) -> Quality:
    metric = task.metric()
    finite: torch.Tensor | None = None
    samples = 0
    drawn = limit is not None and limit < len(split)
    with torch.no_grad():
        for batch in whole_batches(spec, split, split_name, batch_size=batch_size, shuffle=drawn, seed=_SAMPLE_SEED):
            args, kwargs = task.inputs(batch)
            outputs = predict(*args, **kwargs)
            task.update(metric, outputs, batch)
            if watch is not None:
                watch(outputs, batch)
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
