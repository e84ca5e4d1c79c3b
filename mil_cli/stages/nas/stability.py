"""When a search by gradients has gone too far: its architecture skips too much, or its loss bends ever more sharply."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mil_cli.stages.nas.strengths import Strengths, Weights

_TOLERANCE = 1e-3
"""Of an eigenvalue, relative: batches differ by far more."""


def too_many_skips(strengths: Strengths, skips: Callable[[Weights], int], most: int) -> str | None:
    """Go back by an epoch if the architecture came to have too many skips in it, and say why; else return None.

    Liang et al. 2019, "DARTS+: Improved Differentiable Architecture Search with Early Stopping" (arXiv:1909.06035).
    Until an epoch has few enough, skips are a matter of chance.

    Args:
        strengths: The strengths, recorded after each epoch.
        skips: Counts those of the architecture that weights stand for.
        most: As many are let pass.
    """
    if len(strengths.trace) < 2:
        return None
    before, now = (skips(strengths.weights(*epoch)) for epoch in strengths.trace[-2:])
    if before > most or now <= most:
        return None
    strengths.go_back(1)
    return f"the architecture came to have {now} skips; the one before is taken"


def too_sharp(strengths: Strengths, most: float, *, window: int) -> str | None:
    """Go back to before the largest eigenvalue grew too fast, if it did, and say why; else return None.

    Zela et al. 2020, "Understanding and Robustifying Differentiable Architecture Search" (arXiv:1909.09656): where the
    loss bends sharply over the strengths, an architecture, which has an operator where there was a mixture, is far
    worse than the mixture. Eigenvalues are averaged over `window` epochs; with the authors' 5, that average is held
    against the one of four epochs before, and the strengths in the middle of the earlier one are taken.

    Args:
        strengths: The strengths and eigenvalues, recorded after each epoch.
        most: As many times the earlier average are let pass.
        window: Epochs in an average.
    """
    values, back = strengths.eigenvalues, window - 1
    if len(values) < window + back:
        return None
    now, before = fmean(values[-window:]), fmean(values[-window - back : -back])
    if before <= 0 or now <= most * before:
        return None
    strengths.go_back(back + window // 2)
    return (
        f"the largest eigenvalue of the loss over the strengths grew to {now / before:.2f} of what it was {back} epochs"
        " before; the strengths of that time are taken"
    )


def largest_eigenvalue(loss: Callable[[Tensor], Tensor], at: Tensor) -> float:
    """Return the largest eigenvalue of the Hessian of a loss, by Lanczos' method.

    Args:
        loss: Gives a scalar that can be differentiated twice.
        at: Where, (n,), with n of at least 2.
    """
    with torch.enable_grad():
        leaf = at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        direction = torch.as_tensor(vector.ravel(), dtype=leaf.dtype, device=leaf.device)
        (turned,) = torch.autograd.grad(slope, leaf, direction, retain_graph=True, materialize_grads=True)
        return turned.double().cpu().numpy()

    size = leaf.numel()
    start = np.random.default_rng(0).standard_normal(size)
    if not slope.requires_grad or not product(start).any():
        return 0.0  # a plane, which has no direction for Lanczos' method to begin with
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False)[0])
