"""Coupled dimensions: which axes of which weights must be cut together, cutting them, and proving the cut."""

from mil_cli.graph.coupling.counts import Counter, Dropped, RunningCall, macs_of
from mil_cli.graph.coupling.coupling import Coupling, Frozen, Member, Removed, Space
from mil_cli.graph.coupling.cut import shared_cut
from mil_cli.graph.coupling.entry import analyse, check_equivalence, cut
from mil_cli.graph.coupling.equivalence import EquivalenceReport
from mil_cli.graph.coupling.memory import MemoryEstimate
from mil_cli.graph.coupling.norms import group_norms
from mil_cli.graph.coupling.reorder import arrange, reorder
from mil_cli.graph.coupling.rows import Rows, entry_spaces, find_rows
from mil_cli.graph.coupling.selection import repair, step_of
from mil_cli.graph.coupling.sketch import Sketcher

__all__ = [
    "Counter",
    "Coupling",
    "Dropped",
    "EquivalenceReport",
    "Frozen",
    "Member",
    "MemoryEstimate",
    "Removed",
    "Rows",
    "RunningCall",
    "Sketcher",
    "Space",
    "analyse",
    "arrange",
    "check_equivalence",
    "cut",
    "entry_spaces",
    "find_rows",
    "group_norms",
    "macs_of",
    "reorder",
    "repair",
    "shared_cut",
    "step_of",
]
