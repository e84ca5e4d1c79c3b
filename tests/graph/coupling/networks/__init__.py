"""One small network for each kind of structure that an analysis meets, by name; one file a kind."""

from tests.graph.coupling.networks import (  # noqa: F401  (each registers its networks)
    attention,
    attention_parts,
    batches,
    convolution,
    gates,
    libraries,
    outputs,
    positions,
    products,
    pyramids,
    recurrent,
    regions,
    views,
    weights,
)
from tests.graph.coupling.networks.base import EXPECTED, NETWORKS, TRICKS

__all__ = ["EXPECTED", "NETWORKS", "TRICKS"]
