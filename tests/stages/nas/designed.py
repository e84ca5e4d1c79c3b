"""A small designed space on the digits, and a context whose recipe has it as its model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from mil_cli.data.digits import digits
from mil_cli.events import Progress
from mil_cli.graph.model import Model
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import DesignedSpace
from mil_cli.spaces.largest import largest
from mil_cli.stages.context import Context
from tests.stages.contexts import make_context


def space(seed: int = 0) -> DesignedSpace:
    """Return the space, of two stages with up to two blocks each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DesignedSpace(small_nets(widths=((4, 8), (8, 16)), blocks=(2, 2)))


@cache
def incoming() -> Model:
    """Return what a stage of such a recipe is given; it is shared, so not to be changed."""
    return Model.capture(largest(space().module), (torch.zeros(2, 1, 8, 8),))


def context(workspace: Path | None = None, progress: Progress | None = None, **changes: Any) -> Context:
    """Return the context, of seed 0."""
    return make_context(
        digits(),
        workspace=workspace,
        progress=progress,
        load_space=space,
        capture=lambda module: Model.capture(module, incoming().samples[0]),
        space_fingerprint=lambda: "space",
        **changes,
    )
