"""GraSP as a score: how removing weights would change the flow of gradients, by second derivatives."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mil_cli.assess.scores.subject import Subject


def grasp(subject: Subject) -> float:
    """Return ``-sum(weight * (H gradient))``, H the second derivative of the loss by the weights.

    Wang et al. 2020, "Picking winning tickets before training by preserving gradient flow". The sign, and the loss
    without a temperature, are those of Abdelfattah et al. 2021, "Zero-cost proxies for lightweight NAS", who found
    quality to go with the negative of what GraSP sums. Weights are those of convolutions and linear layers.
    """
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradients = torch.autograd.grad(
            subject.loss(), subject.weights, create_graph=True, allow_unused=True, materialize_grads=True
        )
    bent = [gradient for gradient in gradients if gradient.requires_grad]
    curved = torch.autograd.grad(
        bent,
        subject.weights,
        [gradient.detach() for gradient in bent],
        allow_unused=True,
        materialize_grads=True,
    )
    pairs = zip(subject.weights, curved, strict=True)
    return -sum(float((weight.detach() * change).sum()) for weight, change in pairs)
