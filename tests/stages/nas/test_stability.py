"""When searches by gradients end: eigenvalues against whole Hessians, and which epoch's strengths are taken."""

from __future__ import annotations

import pytest
import torch

from mil_cli.stages.nas.stability import largest_eigenvalue, too_many_skips, too_sharp
from mil_cli.stages.nas.strengths import Strengths, Weights
from tests.stages.nas.test_relaxed import split, strengths_of, tiny


@pytest.mark.parametrize("size", [2, 3, 40])
def test_the_largest_eigenvalue_is_that_of_the_matrix(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    at = torch.randn(size, generator=generator, dtype=torch.float64)
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    assert largest_eigenvalue(lambda x: x @ matrix @ x / 2, at) == pytest.approx(expected, rel=1e-3)


def test_the_largest_eigenvalue_is_that_of_the_mixtures_whole_hessian() -> None:
    space = tiny()
    space.module.double()
    strengths = strengths_of(space, edges=True).double()
    strengths.updates += 1
    x, y = next(split().batches(8))

    def loss(weights: Weights) -> torch.Tensor:
        with space.mixed(weights):
            return torch.nn.functional.cross_entropy(space.module(x.double()), y)

    strengths.record(loss)
    flat = torch.cat([strengths.alpha, strengths.beta])
    hessian = torch.autograd.functional.hessian(lambda at: loss(strengths.weights(*torch.split(at, [9, 3]))), flat)  # type: ignore[no-untyped-call]
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert strengths.eigenvalues == [pytest.approx(expected, rel=1e-3)]
    assert expected > 0


@pytest.mark.parametrize("power", [0, 1])
def test_a_plane_does_not_bend(power: int) -> None:
    assert largest_eigenvalue(lambda x: (x * torch.arange(3)).sum() ** power, torch.ones(3)) == 0


def recorded(epochs: int) -> Strengths:
    """Return strengths whose first one was the number of the epoch."""
    strengths = strengths_of(tiny())
    strengths.record()  # not learning yet
    strengths.updates += 1
    for epoch in range(epochs):
        strengths.alpha[0] = epoch
        strengths.record()
    assert len(strengths.trace) == epochs
    assert len(strengths.history) == epochs + 1
    return strengths


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ([1.0] * 4 + [9.0], None),  # too few to say
        ([1.0, 1.0, 1.0, 1.0, 1.9], None),  # from 1 to 1.3
        ([1.0, 1.0, 1.0, 1.0, 2.0], 1),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 2.0], 2),
        ([-1.0, -1.0, -1.0, 1.0, 2.0], None),
    ],
)
def test_strengths_of_the_middle_of_the_flat_time_are_taken(values: list[float], taken: int | None) -> None:
    strengths = recorded(len(values))
    strengths.eigenvalues = values
    window = 5 if values == [1.0] * 4 + [9.0] else 3
    reason = too_sharp(strengths, 1.3, window=window)
    assert (reason is None) == (taken is None)
    assert float(strengths.alpha[0]) == (len(values) - 1 if taken is None else taken)


@pytest.mark.parametrize(("counts", "stops"), [([1], False), ([3, 3], False), ([1, 2], False), ([1, 3], True)])
def test_strengths_of_the_epoch_before_too_many_skips_are_taken(counts: list[int], stops: bool) -> None:
    strengths = recorded(len(counts))
    of = {
        tuple(strengths.weights(*at)["first.edges.0"].tolist()): n
        for at, n in zip(strengths.trace, counts, strict=True)
    }
    reason = too_many_skips(strengths, lambda weights: of[tuple(weights["first.edges.0"].tolist())], 2)
    assert (reason is not None) == stops
    assert float(strengths.alpha[0]) == len(counts) - 1 - stops
