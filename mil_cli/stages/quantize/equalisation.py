"""Cross-layer equalisation: channels of neighbouring layers get weights of the same range."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from mil_cli.graph.nodes import op_name
from mil_cli.stages.quantize.rescale import LAYERS, find_links, made_range, move, read_range

_MOST_SWEEPS = 100
_TOLERANCE = 1e-3


def equalise(graph: GraphModule) -> int:
    """Equalise the ranges of the weights on both sides of values between two layers, in place.

    With ranges ``r1`` of what makes a channel and ``r2`` of what reads it, the maker is divided and the reader
    multiplied by ``sqrt(r1 / r2)``: both have ``sqrt(r1 r2)`` then. Repeated over all pairs until nothing moves. It
    works through ReLU, pooling and nothing at all, whose outputs grow with their inputs; not through ReLU6 or GELU. As
    in Nagel et al., Data-free quantization through weight equalization and bias correction (2019, arXiv:1906.04721).

    Args:
        graph: A graph in evaluation mode, batch norms folded, in-place operators replaced.

    Returns:
        How many pairs of layers there are.
    """
    links = [link for link in find_links(graph) if op_name(link.maker) in LAYERS and len(link.readers) == 1]
    for _ in range(_MOST_SWEEPS):
        furthest = 0.0
        for link in links:
            first, second = made_range(graph, link.maker), read_range(graph, link.readers[0])
            # A channel of zeros on either side has no range that could be matched.
            factor = torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)
            move(graph, link, factor)
            furthest = max(furthest, float(factor.log().abs().max()))
        if furthest < _TOLERANCE:
            break
    return len(links)
