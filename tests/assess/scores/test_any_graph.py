"""Every score of networks of all kinds: a number, or a message that says why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.assess.scores.registry import MEASURES, score
from mil_cli.errors import CaptureError, ModelError
from mil_cli.graph.model import Model
from tests.graph.coupling.networks import NETWORKS

SAMPLES = 6


def squares(outputs: Any, batch: object) -> Tensor:
    """Return a loss of whatever a network gives."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_score_is_a_number_or_says_why_not(name: str) -> None:
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    inputs = [torch.randn(SAMPLES, *shape) for _ in range(2)]
    try:
        model = Model.capture(module, (inputs[0],))
    except CaptureError:  # it takes tokens
        inputs = [torch.randint(0, 8, (SAMPLES, *shape)) for _ in range(2)]
        model = Model.capture(module, (inputs[0],))
    task: Any = SimpleNamespace(inputs=lambda batch: (batch, {}), loss=squares)
    missing = {}
    for measure in MEASURES:
        try:
            assert isinstance(score(model, [measure], task=task, batches=[(x,) for x in inputs])[measure].value, float)
        except ModelError as problem:
            missing[measure] = problem.what
    assert set(missing) <= {"naswot", "jacov"}
    assert "no rectifier" in missing.get("naswot", "no rectifier")
    assert "no floating-point input" in missing.get("jacov", "no floating-point input")
