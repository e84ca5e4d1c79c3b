"""Soft masks: a gate on every channel is trained with the weights until the gates keep what the target allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Counter, Coupling, analyse, group_norms
from mil_cli.graph.coupling.expected import ExpectedCount
from mil_cli.ops.hard_concrete import SHIFT, hard_concrete, probability_open
from mil_cli.stages.prune.constraint import Constraint
from mil_cli.stages.prune.gates import Gates, fold_gates, insert_gates, place_gates
from mil_cli.stages.prune.regularise import TrainedPruningConfig, trained_before
from mil_cli.stages.prune.schedule import choose, prune
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.selection import Scores

_OPEN = 0.99
"""The probability of being open that every gate starts with."""


class SoftMaskConfig(TrainedPruningConfig):
    """Settings of soft masks.

    Attributes:
        ramp: Share of the training over which what may be kept falls to the target; the rest is for weights and gates
            to settle.
        reach: Log-odds that a gate can travel over the training: between surely open and surely closed lie about 10.
        dual_reach: How far the constraint's multiplier could rise over the training, in units of the loss's gradient by
            the gates.
    """

    method: ClassVar[str] = "soft_mask"
    version: ClassVar[int] = 3

    ramp: float = Field(0.5, ge=0, le=1)
    reach: float = Field(60.0, gt=0, allow_inf_nan=False)
    dual_reach: float = Field(200.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_cut(self) -> SoftMaskConfig:
        if self.steps != 1:
            raise ValueError("gates are trained once and cut once: leave steps at 1, and give trainer more epochs")
        return self


@stage(SoftMaskConfig)
def soft_mask(model: Model, config: SoftMaskConfig, context: Context) -> Model:
    """Train a hard-concrete gate on each class together with the weights under the target, then cut what they close.

    Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization" (ICLR), for the gates;
    Gallego-Posada et al. 2022, "Controlled Sparsity via Constrained Optimization" (NeurIPS), for the target as a
    constraint. Gates multiply the weights that read a class, or all of its weights where something else reads it too;
    they are folded into these in the end, and the classes whose gates are open with the least probability are cut.
    Where the target is a latency or a memory, training keeps to the multiply-accumulates of the cut by magnitude that
    meets it.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, training and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    coupling = analyse(model)
    gates = place_gates(model.graph, coupling)
    if not gates.count:
        raise StageError(
            "no channel of the model can have a gate: none that can be cut has weights",
            where=f"stages.{context.name}.method",
            hint="`mil inspect` says what cannot be cut, and why",
        )
    target, expected, table = _target(model, coupling, config, context)
    constraint = Constraint(
        gates, expected, target=target, ramp=config.ramp, reach=config.reach, dual_reach=config.dual_reach
    )
    gated = model.clone().eval()
    insert_gates(gated.graph, gates, start=float(torch.tensor(_OPEN).logit()) + SHIFT)
    constraint.insert(gated.graph)
    before = context.evaluate(model).value
    trained = trained_before(gated, config, context, constraint.before_step)
    folded, odds = fold_gates(trained, model, gates)
    context.note(
        quality_before_training=before,
        quality_after_training=context.evaluate(folded).value,
        expected_share=float(constraint.left(odds)),
        allowed_share=target,
        gates=gates.count,
        gates_closed=int((hard_concrete(odds, False) == 0).sum()),
    )
    together = config.model_copy(update={"independent": False})  # a class has one gate, whatever groups it lies in
    return prune(folded, together, context, lambda _, current: _scores(current, gates, odds), known=table)


def _target(
    model: Model, coupling: Coupling, config: SoftMaskConfig, context: Context
) -> tuple[float, ExpectedCount, Mapping[str, float]]:
    """Return the share that may be left, what counts it, and the table of a latency as far as it was measured."""
    counter = Counter(coupling)
    match config.quantity:
        case "macs" | "params" | "channels" as counted:
            counts = {"macs": counter.macs, "params": counter.params, "channels": counter.channels}
            start = counts[counted]({})
            return min(config.kept.resolve(start) / start, 1.0), ExpectedCount(counter, counted), {}
        case _:
            removed, table = choose(model, coupling, group_norms(model.graph, coupling), config, context)
            return counter.macs(removed) / counter.macs({}), ExpectedCount(counter, "macs"), table


def _scores(coupling: Coupling, gates: Gates, odds: Tensor) -> Scores:
    """Return by space the probability that each class's gate is open; NaN without a gate."""
    open_ = torch.cat([probability_open(odds.double()), torch.full((1,), torch.nan, dtype=torch.float64)])[gates.places]
    ends = np.cumsum([space.size for space in coupling.spaces])
    return np.split(open_.numpy(), ends[:-1])
