"""Relations of samples: distances and angles by loops over pairs and triples, and what leaves them as they are."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mil_cli.stages.distill.relational import (
    RelationalConfig,
    angle_difference,
    distance_difference,
    relational_difference,
)


def _huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def _distances(vectors: Tensor) -> dict[tuple[int, ...], float]:
    found = {(i, j): float((vectors[i] - vectors[j]).norm()) for i, j in permutations(range(len(vectors)), 2)}
    mean = sum(found.values()) / len(found)
    return {pair: distance / mean for pair, distance in found.items()}


def _angles(vectors: Tensor) -> dict[tuple[int, ...], float]:
    """Return for each triple the cosine at its second."""
    result = {}
    for i, j, k in permutations(range(len(vectors)), 3):
        one, other = vectors[i] - vectors[j], vectors[k] - vectors[j]
        result[i, j, k] = float(one @ other / (one.norm() * other.norm()))
    return result


@pytest.mark.parametrize(("difference", "relations"), [(distance_difference, _distances), (angle_difference, _angles)])
def test_all_pairs_and_triples_written_out(difference, relations) -> None:  # type: ignore[no-untyped-def]
    student, teacher = torch.randn(6, 3), torch.randn(6, 8).exp()
    one, other = relations(student.double()), relations(teacher.double())
    expected = sum(_huber(one[key] - other[key]) for key in one) / len(one)
    torch.testing.assert_close(difference(student, teacher), torch.tensor(expected))


def test_turning_moving_and_scaling_change_nothing() -> None:
    vectors, others = torch.randn(7, 5), torch.randn(7, 4)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    moved = 3.5 * vectors @ turn + torch.randn(5)
    for difference in (distance_difference, angle_difference):
        torch.testing.assert_close(difference(moved, vectors), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(difference(moved, others), difference(vectors, others), atol=1e-5, rtol=1e-4)


def test_both_are_added_by_their_weights_on_averages_over_positions() -> None:
    student, teacher = torch.randn(5, 3, 2, 2), torch.randn(5, 6, 7)
    one, other = student.mean((2, 3)), teacher.mean(2)
    expected = 0.5 * distance_difference(one, other) + 3 * angle_difference(one, other)
    result = relational_difference(student, teacher, distance_weight=0.5, angle_weight=3)
    torch.testing.assert_close(result, expected)


def test_samples_that_fall_together_and_small_batches_give_finite_gradients() -> None:
    teacher = torch.randn(4, 5)
    for student in (torch.zeros(4, 3), torch.randn(2, 3)[[0, 1, 0, 1]], torch.randn(2, 3), torch.randn(1, 3)):
        student.requires_grad_()
        loss = relational_difference(student, teacher[: len(student)], distance_weight=1, angle_weight=2)
        (loss + 0 * student.sum()).backward()
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
    assert float(loss) == 0


def test_distances_of_many_wide_features_take_little_memory() -> None:
    vectors = torch.randn(512, 4096, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        distance_difference(vectors, torch.randn(512, 4)).backward()
    # All pairs of all channels would be 4 GB.
    assert max(event.cpu_memory_usage for event in profile.events()) < 50e6


def test_angles_are_those_of_the_first_samples() -> None:
    student, teacher = torch.randn(140, 3), torch.randn(140, 3)
    result = relational_difference(student, teacher, distance_weight=0, angle_weight=1)
    torch.testing.assert_close(result, angle_difference(student[:128], teacher[:128]))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValidationError):
        RelationalConfig.model_validate({"angle_weight": -1})
