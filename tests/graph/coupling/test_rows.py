"""Entries inside groups and heads are chosen independently: permuted weights compute the same, any choice is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import arrange, entry_spaces, find_rows
from mil_cli.graph.coupling.analysis import analyse_graph
from mil_cli.graph.coupling.cut import cut_graph
from mil_cli.graph.model import copy_graph
from tests.graph.coupling.networks import NETWORKS
from tests.graph.coupling.test_networks import BATCH, captured, warmed


def analysed(name: str) -> tuple[nn.Module, object, tuple[int, ...]]:
    torch.manual_seed(0)
    module, shape = NETWORKS[name]()
    warmed(module)
    return module, captured(module, torch.randn(2, *shape)), shape


def grouped_weights_at_zero(module: nn.Module, gone: dict[str, list[int]]) -> nn.Module:
    with torch.no_grad():
        for name, entries in gone.items():
            module.get_parameter(name)[entries] = 0
    return module


@pytest.mark.parametrize(
    ("name", "space_of", "weights"),
    [
        ("vision_transformer", lambda labels: (labels >= 0)[-32:].all(), ["qkv.weight", "qkv.bias"]),
        ("vision_transformer", lambda labels: (labels >= 0)[:32].all(), ["qkv.weight", "qkv.bias"]),
    ],
    ids=["values", "queries_and_keys"],
)
def test_every_head_loses_entries_of_its_own(name: str, space_of: Callable[[Tensor], bool], weights: list[str]) -> None:
    module, graph, shape = analysed(name)
    coupling = analyse_graph(graph, (torch.randn(BATCH, *shape),))
    rows = find_rows(coupling)
    number = next(number for number, found in rows.items() if space_of(found.places[f"@{weights[0]}"][0].reshape(-1)))
    found = rows[number]
    generator = np.random.default_rng(2)
    orders = {number: np.stack([generator.permutation(found.entries.shape[1]) for _ in found.entries])}
    lost = orders[number][:, :3]  # each head's own three
    assert len({tuple(sorted(row)) for row in lost.tolist()}) > 1
    arranged = copy_graph(graph)
    assert arrange(arranged, coupling, {number: found}, orders, [((torch.randn(2, *shape),), {})]) == [number]
    removed = {number: set(np.array(coupling.spaces[number].free)[:3].tolist())}
    own = dict(arranged.named_parameters())
    cut = cut_graph(coupling, removed, weights=lambda path: own[path])
    x = torch.randn(3, *shape)
    labels = found.places[f"@{weights[0]}"][0].reshape(-1)
    gone = np.isin(labels, np.take_along_axis(found.entries, lost, axis=1)).nonzero()[0].tolist()
    expected = grouped_weights_at_zero(module, dict.fromkeys(weights, gone))(x)
    torch.testing.assert_close(cut(x), expected, rtol=1e-4, atol=1e-5)


def test_single_entries_are_scored_on_whole_axes() -> None:
    _, graph, shape = analysed("grouped")
    coupling = analyse_graph(graph, (torch.randn(BATCH, *shape),))
    rows = find_rows(coupling)
    for found, space in zip(rows.values(), entry_spaces(coupling, rows), strict=True):
        assert space.size == found.size == found.entries.size
        scored = [set(member.classes.tolist()) - {-1} for member in space.members]
        assert set().union(*scored) == set(range(found.size))
