"""Coupled dimensions: which axes of which weights must be cut together, cutting them, and proving the cut."""

from mil_cli.graph.coupling.counts import Counter, macs_of
from mil_cli.graph.coupling.coupling import Coupling, Frozen, Member, Removed, Space
from mil_cli.graph.coupling.entry import analyse, check_equivalence, cut
from mil_cli.graph.coupling.equivalence import EquivalenceReport
from mil_cli.graph.coupling.selection import repair

__all__ = [
    "Counter",
    "Coupling",
    "EquivalenceReport",
    "Frozen",
    "Member",
    "Removed",
    "Space",
    "analyse",
    "check_equivalence",
    "cut",
    "macs_of",
    "repair",
]
