"""Passes that end early: how long they are, what they give, and going on in one."""

from __future__ import annotations

import pytest
import torch

from mil_cli.data.base import Split, batch_count
from mil_cli.data.shortened import Shortened
from mil_cli.data.tensors import TensorSplit

WHOLE = TensorSplit((torch.arange(23),))


def numbers(split: Split, batch_size: int, **options: object) -> list[list[int]]:
    return [batch[0].tolist() for batch in split.batches(batch_size, **options)]  # type: ignore[arg-type,index]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("samples", "batch_size"), [(10, 5), (12, 5), (23, 5), (40, 5), (3, 5)])
def test_a_pass_has_the_batches_of_so_many_samples(samples: int, batch_size: int, drop_last: bool) -> None:
    split = Shortened(WHOLE, samples)
    assert isinstance(split, Split)
    assert len(split) == min(samples, 23)
    found = numbers(split, batch_size, drop_last=drop_last)
    assert len(found) == batch_count(len(split), batch_size, drop_last=drop_last)
    assert found == numbers(WHOLE, batch_size, drop_last=drop_last)[: len(found)]


def test_shuffled_passes_give_other_samples_each_and_go_on_where_they_were() -> None:
    split = Shortened(WHOLE, 10)
    passes = [numbers(split, 5, shuffle=True, seed=1, epoch=epoch) for epoch in range(16)]
    assert {one for batches in passes for batch in batches for one in batch} == set(range(23))
    assert numbers(split, 5, shuffle=True, seed=1, epoch=3, skip=1) == passes[3][1:]
    assert numbers(split, 5, skip=2) == []


def test_the_fingerprint_follows_from_split_and_length() -> None:
    assert Shortened(WHOLE, 10).fingerprint() == Shortened(WHOLE, 10).fingerprint()
    assert Shortened(WHOLE, 10).fingerprint() != Shortened(WHOLE, 11).fingerprint()
    assert Shortened(WHOLE, 30).fingerprint() == Shortened(WHOLE, 23).fingerprint()
