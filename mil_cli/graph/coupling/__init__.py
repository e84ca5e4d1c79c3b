"""Coupled dimensions: which axes of which weights must be cut together, cutting them, and proving the cut."""

from mil_cli.graph.coupling.counts import Counter, Dropped, RunningCall, macs_of
from mil_cli.graph.coupling.coupling import Coupling, Frozen, Member, Removed, Space
from mil_cli.graph.coupling.cut import shared_cut
from mil_cli.graph.coupling.entry import analyse, check_equivalence, cut
from mil_cli.graph.coupling.equivalence import EquivalenceReport
from mil_cli.graph.coupling.norms import group_norms
from mil_cli.graph.coupling.reorder import reorder
from mil_cli.graph.coupling.selection import repair, step_of

__all__ = [
    "Counter",
    "Coupling",
    "Dropped",
    "EquivalenceReport",
    "Frozen",
    "Member",
    "Removed",
    "RunningCall",
    "Space",
    "analyse",
    "check_equivalence",
    "cut",
    "group_norms",
    "macs_of",
    "reorder",
    "repair",
    "shared_cut",
    "step_of",
]
