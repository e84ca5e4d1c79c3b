"""How stages judge a model that they do not train: fresh batch-norm statistics, quality or loss on a part of val."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mil_cli.data.base import batch_length
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.evaluate import NotFiniteError, whole_batches

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_BATCH = 64
_LOSS_BATCH = 256


def with_fresh_statistics(model: Model, context: Context, *, samples: int) -> Model:
    """Return a model whose batch norms have the statistics of training samples.

    Args:
        model: The model; not changed.
        context: Gives the samples.
        samples: How many; 0 leaves the model as it is.
    """
    if not samples:
        return model
    return recalibrate(model, context.calibration(samples=samples, batch_size=_BATCH, model=model))


def quality_or_worst(model: Callable[..., Any], context: Context, *, samples: int) -> float:
    """Return a model's quality on some of val; the worst there is, an infinity, if its outputs are not finite.

    Args:
        model: The model, or a module in evaluation mode.
        context: Gives task and val.
        samples: How many samples of val at most.
    """
    try:
        return context.evaluate(model, limit=min(samples, len(context.data.val))).value
    except NotFiniteError:  # one bad net is no reason to stop a search
        return -math.inf if context.task.higher_is_better else math.inf


def mean_loss(model: Model, context: Context, *, samples: int) -> float:
    """Return the task's loss over some samples of val, drawn at random, always the same ones; infinite if it is NaN.

    Raises:
        DataError: The model's batch is fixed to more samples than val has.
    """
    val, task = context.data.val, context.task
    weighted = seen = 0.0
    with torch.no_grad():
        for batch in whole_batches(model.spec, val, "val", batch_size=_LOSS_BATCH, shuffle=samples < len(val)):
            args, kwargs = task.inputs(batch)
            weighted += float(task.loss(model(*args, **kwargs), batch)) * batch_length(batch)
            seen += batch_length(batch)
            if seen >= samples:
                break
    return weighted / seen if math.isfinite(weighted) else math.inf
