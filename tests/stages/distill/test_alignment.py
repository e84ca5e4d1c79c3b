"""Features at the same positions, against sums written out."""

from __future__ import annotations

import pytest
import torch

from mil_cli.stages.distill.alignment import aligned, meeting


def test_the_finer_map_is_averaged_on_each_axis() -> None:
    fine, coarse = torch.rand(2, 3, 4, 6), torch.rand(2, 5, 8, 3)
    one, other = aligned(fine, coarse)
    assert one.shape == (2, 3, 4, 3)
    assert other.shape == (2, 5, 4, 3)
    for row in range(4):
        for column in range(3):
            expected = fine[:, :, row, 2 * column : 2 * column + 2].mean(-1)
            torch.testing.assert_close(one[:, :, row, column], expected)
            torch.testing.assert_close(other[:, :, row, column], coarse[:, :, 2 * row : 2 * row + 2, column].mean(-1))


def test_equal_positions_are_not_copied() -> None:
    one, other = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    assert all(after is before for after, before in zip(aligned(one, other), (one, other), strict=True))


def test_tokens_lie_as_the_map_does() -> None:
    grid, fine = torch.rand(2, 3, 2, 4), torch.rand(2, 5, 4, 8)
    tokens = torch.cat([torch.full((2, 3, 1), 99.0), grid.flatten(2)], 2)
    one, other = aligned(tokens, fine)
    torch.testing.assert_close(one, grid)
    assert other.shape == (2, 5, 2, 4)
    back, forth = aligned(fine, tokens)
    assert torch.equal(forth, one)
    assert torch.equal(back, other)


def test_sequences_are_compared_token_by_token_if_they_can_be() -> None:
    one, other = aligned(torch.rand(2, 3, 7), torch.rand(2, 5, 7))
    assert one.shape[2:] == other.shape[2:] == (7,)
    assert meeting((50,), (17,)) == ((7, 7), (4, 4), (4, 4))
    assert meeting((49,), (16,)) == ((7, 7), (4, 4), (4, 4))
    assert meeting((30,), (15,)) == ((30,), (15,), (15,))


def test_sequences_of_a_convolution_keep_their_axis() -> None:
    one, other = torch.rand(2, 3, 16), torch.rand(2, 5, 64)
    left, right = aligned(one, other, tokens=(False, False))
    assert left is one
    torch.testing.assert_close(right, other.reshape(2, 5, 16, 4).mean(3))
    assert meeting((16,), (64,)) == ((4, 4), (8, 8), (4, 4))
    assert meeting((16,), (4, 4), tokens=(False, True)) is None
    assert meeting((4, 4), (16,), tokens=(True, False)) is None
    assert meeting((16,), (4, 4), tokens=(True, False)) == ((4, 4), (4, 4), (4, 4))


def test_against_a_vector_positions_are_averaged() -> None:
    vector, feature = torch.rand(2, 5), torch.rand(2, 3, 4, 4)
    one, other = aligned(feature, vector)
    torch.testing.assert_close(one, feature.mean((2, 3)))
    assert other is vector


@pytest.mark.parametrize(("one", "other"), [((4, 4), (24,)), ((4, 4), (2, 2, 2)), ((2, 2, 2, 2), (2, 2, 2, 1))])
def test_what_cannot_meet_is_told(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert meeting(one, other) is None
    with pytest.raises(ValueError, match="cannot be compared"):
        aligned(torch.rand(2, 3, *one), torch.rand(2, 3, *other))
