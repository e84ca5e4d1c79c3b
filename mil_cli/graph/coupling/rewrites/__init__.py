"""How each op's constants change when its tensors are cut: one table of rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mil_cli.graph.coupling.rewrites import positions, sizes
from mil_cli.graph.coupling.rewrites.edit import Edit, Rewrite

REWRITES: Mapping[str, Rewrite] = MappingProxyType({**sizes.REWRITES, **positions.REWRITES})
"""Op name -> rewrite; ops that hold no constants of the kind need none."""

__all__ = ["REWRITES", "Edit"]
