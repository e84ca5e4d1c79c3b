"""Rounding that is learned: each weight goes to the code below it or above it, whichever serves the outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mil_cli.stages.quantize.insert import Quantizer

_GAMMA, _ZETA = -0.1, 1.1
"""How far the sigmoid is stretched, so that it reaches 0 and 1."""


class SoftRounding(nn.Module):
    """A weight between its two neighbouring codes: ``scale * clip(floor(w / scale) + h, min, max)``.

    Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020): ``h`` in [0, 1] is a stretched
    and clipped sigmoid of what is learned, and starts at the weight's own fraction, so that the weight starts as it is
    (clipped). Weights of 0 stay, so that a sparse layer does.

    Args:
        weight: The weight, any shape.
        form: Its scale and codes; the zero point is 0.
    """

    def __init__(self, weight: Tensor, form: Quantizer) -> None:
        super().__init__()
        shape = [1] * weight.ndim
        if form.axis is not None:
            shape[form.axis] = -1
        self._codes = form.codes
        self._scale = form.scale.detach().reshape(shape)
        steps = weight.detach() / self._scale
        self._floor = steps.floor()
        share = (steps - self._floor - _GAMMA) / (_ZETA - _GAMMA)
        self._moves = steps != 0
        self.logits = nn.Parameter(torch.logit(share))

    def shares(self) -> Tensor:
        """Return ``h``: how far each weight lies above the code below it, in [0, 1]."""
        return (torch.sigmoid(self.logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0) * self._moves

    def forward(self) -> Tensor:
        """Return the weight as it is now."""
        return self._at(self.shares())

    def penalty(self, exponent: float) -> Tensor:
        """Return ``sum(1 - |2 h - 1|^exponent)``, which is 0 where every weight is decided."""
        return (1 - (2 * self.shares() - 1).abs().pow(exponent)).sum()

    @torch.no_grad()
    def decided(self) -> Tensor:
        """Return the weight with every share gone to the nearer of 0 and 1: it lies on its codes."""
        return self._at((self.shares() >= 0.5).to(self._floor.dtype))

    @torch.no_grad()
    def undecided(self) -> int:
        """Return how many weights learning has left between two codes."""
        shares = self.shares()
        return int(((shares > 0) & (shares < 1)).sum())

    def _at(self, shares: Tensor) -> Tensor:
        return (self._floor + shares).clamp(self._codes.quant_min, self._codes.quant_max) * self._scale


def exponent_at(done: float, *, warmup: float, start: float, end: float) -> float | None:
    """Return the penalty's exponent after a share `done` of the iterations: from `start` to `end`, linearly.

    High exponents leave weights free near the middle, low ones push them to the ends. None: in the share `warmup` at
    the beginning, without a penalty.
    """
    if done < warmup:
        return None
    return start + (end - start) * (done - warmup) / (1 - warmup)
