"""Weights read from codebooks: values and gradients against plain indexing, brute force and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mil_cli.ops.codebook import cluster, lookup, nearest


def example(groups: int, entries: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(groups)
    weight = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    return weight, torch.randn(groups * entries, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_nearest_is_the_nearest_of_all(groups: int) -> None:
    weight, codebook = example(groups)
    found = nearest(weight, codebook, groups).reshape(groups, -1)
    for rows, entries, places in zip(weight.reshape(groups, -1), codebook.reshape(groups, -1), found, strict=True):
        assert torch.equal(places, (rows[:, None] - entries).abs().argmin(1))


@pytest.mark.parametrize("groups", [1, 3])
def test_lookup_is_indexing_and_the_mean_of_its_gradients(groups: int) -> None:
    _, codebook = example(groups)
    codebook.requires_grad_(True)
    indices = torch.randint(0, 5, (6, 3, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = lookup(codebook, indices, groups)
    offsets = torch.arange(groups).repeat_interleave(36 // groups).reshape(6, 3, 2) * 5
    expected = codebook[indices.long() + offsets]
    assert torch.equal(found, expected)
    upstream = torch.randn(6, 3, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found, codebook, upstream)
    (wanted,) = torch.autograd.grad(expected, codebook, upstream)
    counts = torch.bincount((indices.long() + offsets).flatten(), minlength=len(codebook))
    torch.testing.assert_close(gradient, wanted / counts.clamp(min=1))
    moved = 1e-4 * torch.eye(len(codebook), dtype=torch.float64)
    start = codebook.detach()
    ends = [
        [float((lookup(end, indices, groups) * upstream).sum()) for end in (start + one, start - one)] for one in moved
    ]
    slopes = torch.tensor([(high - low) / 2e-4 for high, low in ends], dtype=torch.float64)
    torch.testing.assert_close(gradient * counts, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("groups", [1, 3])
def test_cluster_rounds_and_shares_gradients(groups: int) -> None:
    weight, codebook = example(groups)
    weight.requires_grad_(True)
    codebook.requires_grad_(True)
    places = nearest(weight, codebook, groups)
    found = cluster(weight, codebook, groups)
    assert torch.equal(found, lookup(codebook, places.to(torch.uint8), groups))
    upstream = torch.randn(6, 3, 2, dtype=torch.float64)
    to_weight, to_codebook = torch.autograd.grad(found, (weight, codebook), upstream)
    assert torch.equal(to_weight, upstream)
    rows, grads = places.reshape(groups, -1), upstream.reshape(groups, -1)
    for group in range(groups):
        for entry in range(5):
            own = grads[group][rows[group] == entry]
            expected = own.mean() if len(own) else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(to_codebook[group * 5 + entry], expected)


def test_operators_meet_torchs_own_checks() -> None:
    weight, codebook = example(2)
    indices = nearest(weight, codebook, 2).to(torch.uint8)
    torch.library.opcheck(torch.ops.mil.lookup.default, (codebook.requires_grad_(True), indices, 2))
    torch.library.opcheck(torch.ops.mil.cluster.default, (weight, codebook, 2))
