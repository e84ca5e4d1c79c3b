"""The constraint on what gates are expected to keep: an update of the gates and of its multiplier for each step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from mil_cli.graph.coupling.expected import ExpectedCount
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import set_attribute
from mil_cli.ops.hard_concrete import probability_open
from mil_cli.stages.prune.gates import Gates

_DECAYS = (0.9, 0.99)
_SMALLEST = 1e-12


class Constraint:
    """Moves gates down the task's loss plus a multiplier times what is kept too much, after each backward pass.

    Gallego-Posada et al. 2022, "Controlled Sparsity via Constrained Optimization" (NeurIPS): the multiplier rises with
    what is kept above the target, and starts anew from 0 once the target holds. Two things are made independent of the
    task: the multiplier counts in units of the loss's own gradient by the gates, and the gates take steps of Adam whose
    size is a share of the training, so that neither the scale of the loss nor the number of steps nor the optimizer of
    the weights needs another setting. All that it remembers lies in buffers beside the gates.

    Args:
        gates: The gates; the hook takes their gradient away, so that the weights' optimizer leaves them alone.
        expected: Tells what is left.
        target: Share that may be left.
        ramp: Share of the training over which it falls from 1 to the target.
        reach: Log-odds that a gate can travel over a training.
        dual_reach: How far the multiplier can rise over a training in which all is kept.
    """

    def __init__(
        self, gates: Gates, expected: ExpectedCount, *, target: float, ramp: float, reach: float, dual_reach: float
    ) -> None:
        self._gates, self._expected, self._target, self._ramp = gates, expected, target, ramp
        self._reach, self._dual_reach = reach, dual_reach

    def insert(self, graph: GraphModule) -> None:
        """Add the buffers to a graph that has the gates."""
        for name, size in (("mean", self._gates.count), ("square", self._gates.count), ("multiplier", 1), ("scale", 1)):
            set_attribute(graph, f"{self._gates.owner}.{name}", torch.zeros(size))

    def left(self, log_odds: Tensor) -> Tensor:
        """Return the share that gates are expected to keep, with a gradient."""
        return self._expected(self._gates.by_class(probability_open(log_odds.cpu().double())))

    def allowed(self, steps: int, total: int) -> float:
        """Return the share that may be kept after a number of steps."""
        end = self._ramp * total
        return 1 - (1 - self._target) * (min(steps / end, 1.0) if end > 0 else 1.0)

    def before_step(self, training: Model, steps: int, total: int) -> None:
        """Update gates and multiplier; a `StepHook`."""
        log_odds = training.graph.get_parameter(self._gates.log_odds)
        if log_odds.grad is None:
            return
        task = log_odds.grad.nan_to_num(0.0, 0.0, 0.0)
        log_odds.grad = None
        odds = log_odds.detach().cpu().requires_grad_(True)
        left = self.left(odds)
        (push,) = torch.autograd.grad(left, odds)
        memory = training.graph.get_submodule(self._gates.owner)
        self._move(log_odds, task, push.to(task), float(left.detach()), memory, steps, total)

    @torch.no_grad()
    def _move(
        self,
        log_odds: Tensor,
        task: Tensor,
        push: Tensor,
        left: float,
        memory: torch.nn.Module,
        steps: int,
        total: int,
    ) -> None:
        mean, square, multiplier, scale = (
            memory.get_buffer(name) for name in ("mean", "square", "multiplier", "scale")
        )
        first, second = _DECAYS
        excess = left - self.allowed(steps, total)
        if excess > 0:
            multiplier.add_(self._dual_reach / total * excess)
        else:
            multiplier.zero_()
        scale.mul_(second).add_((1 - second) * task.square().mean())
        size = (scale / (1 - second ** (steps + 1))).sqrt() / push.square().mean().sqrt().clamp(min=_SMALLEST)
        gradient = task + multiplier * size * push
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient.square(), 1 - second)
        step = mean / (1 - first ** (steps + 1))
        root = (square / (1 - second ** (steps + 1))).sqrt()
        log_odds.sub_(self._reach / total * step / root.clamp(min=_SMALLEST))
