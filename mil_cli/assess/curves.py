"""What the beginning of a training says of its end: scores of a learning curve, larger where it promises more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from mil_cli.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

Form = Literal["power", "log_power"]
_PARAMETERS = 3
_FURTHEST = 10.0
"""How far above what was seen a limit may lie, over the range that was seen."""
_SLOWEST, _FASTEST = 0.01, 10.0
"""Bounds of the exponent."""


@dataclass(frozen=True)
class Curve:
    """The epochs of one training, as far as it went.

    Attributes:
        train_losses: The mean training loss of each epoch.
        val_qualities: The quality on `val` after each epoch.
        higher_is_better: Whether a higher quality is better.
    """

    train_losses: Sequence[float]
    val_qualities: Sequence[float]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        for name in ("train_losses", "val_qualities"):
            if not len(getattr(self, name)):
                raise DataError("a learning curve has at least one epoch", where=name)


@dataclass(frozen=True)
class Extrapolation:
    """Where a learning curve is expected to arrive.

    Attributes:
        score: The quality, negated where lower is better.
        fitted: Whether a curve could be fitted; otherwise it is the quality after the last epoch.
    """

    score: float
    fitted: bool


def sum_of_losses(curve: Curve, last: int = 1) -> float:
    """Return minus the sum of the training losses over the last epochs: who learns fast is thought to end well.

    Ru et al. 2021, "Speedy performance estimation for neural architecture search" (SoTL-E). It compares trainings of
    equal batch size, length and data.

    Args:
        curve: The training so far.
        last: Over how many epochs.

    Raises:
        DataError: The training is shorter.
    """
    if not 1 <= last <= len(curve.train_losses):
        raise DataError(f"the curve has {len(curve.train_losses)} epochs to sum over", where="last", value=last)
    return -math.fsum(curve.train_losses[-last:])


def early_stopped(curve: Curve) -> float:
    """Return the quality on `val` where the training stopped, negated where lower is better."""
    return float(_rising(curve)[-1])


def extrapolate(curve: Curve, epochs: float = math.inf, form: Form = "power") -> Extrapolation:
    """Continue the curve of qualities to a later epoch by the function that fits it best.

    Domhan et al. 2015, "Speeding up automatic hyperparameter optimization of deep neural networks by extrapolation of
    learning curves": ``power`` is ``a - b t^-c``, ``log_power`` is ``a / (1 + (t / e^b)^-c)``, t the epoch, counted
    from 1, c > 0, fitted by least squares from several starts. A limit lies at most ten times the range that was
    seen above it. Where nothing can be fitted (fewer than four epochs, values that are no numbers or all equal, no
    convergence) the last quality stands.

    Args:
        curve: The training so far.
        epochs: The epoch that it is continued to; infinite: the limit.
        form: The function; ``log_power`` is for qualities above 0, of which higher is better.

    Raises:
        DataError: The epoch is no later one, or `form` is ``log_power`` where lower is better.
    """
    values = _rising(curve)
    if not epochs >= len(values):
        raise DataError(f"the curve has {len(values)} epochs already", where="epochs", value=epochs)
    if form == "log_power" and not curve.higher_is_better:
        raise DataError("rises from 0, so it fits no quality of which lower is better", where="form", value=form)
    end = _end(_FAMILIES[form], values, epochs)
    return Extrapolation(float(values[-1]) if end is None else end, fitted=end is not None)


def _rising(curve: Curve) -> Floats:
    """Return the qualities with a sign by which higher is better."""
    values = np.asarray(curve.val_qualities, dtype=np.float64)
    return values if curve.higher_is_better else -values


def _power(parameters: Floats, epochs: Floats) -> Floats:
    limit, gap, rate = parameters
    return np.asarray(limit - gap * epochs**-rate, dtype=np.float64)


def _log_power(parameters: Floats, epochs: Floats) -> Floats:
    limit, middle, rate = parameters
    return np.asarray(limit / (1 + (epochs / np.exp(middle)) ** -rate), dtype=np.float64)


@dataclass(frozen=True)
class _Family:
    """Functions of one form, of qualities that were brought to a common scale; the first parameter is the limit."""

    function: Callable[[Floats, Floats], Floats]
    second: tuple[float, float]  # bounds of the second parameter
    starts: tuple[float, ...]  # of the second parameter


_FAMILIES: dict[Form, _Family] = {
    "power": _Family(_power, (0.0, np.inf), (1.0, 3.0)),
    "log_power": _Family(_log_power, (-20.0, 20.0), (0.0, 2.0)),
}


def _end(family: _Family, values: Floats, epochs: float) -> float | None:
    """Return the value of the best fit at an epoch, or None where nothing can be fitted."""
    if len(values) <= _PARAMETERS or not np.isfinite(values).all():
        return None
    top, span = float(values.max()), float(np.ptp(values))
    # A power law fits whatever the origin and the unit are; the other form rises from 0.
    origin, unit = (top, span) if family.function is _power else (0.0, top)
    if not span or unit <= 0 or (family.function is _log_power and values.min() <= 0):
        return None
    best = _fit(family, (values - origin) / unit)
    if best is None:
        return None
    return origin + unit * float(family.function(best, np.array([epochs]))[0])


def _fit(family: _Family, values: Floats) -> Floats | None:
    epochs = np.arange(1, len(values) + 1, dtype=np.float64)
    top, span = float(values.max()), float(np.ptp(values))
    bounds = (
        [float(values.min()), family.second[0], _SLOWEST],
        [top + _FURTHEST * span, family.second[1], _FASTEST],
    )

    def residuals(parameters: Floats) -> Floats:
        return family.function(parameters, epochs) - values

    best = None
    for start in itertools.product((top + 0.1 * span, top + span), family.starts, (0.3, 1.0, 3.0)):
        found = least_squares(residuals, np.array(start), bounds=bounds)
        if found.success and (best is None or found.cost < best.cost):
            best = found
    return None if best is None else np.asarray(best.x, dtype=np.float64)
