"""Images that are made smaller as they come: which entries, how, and what stays."""

from __future__ import annotations

import pytest
import torch

from mil_cli.data.base import Split
from mil_cli.data.resized import Resized, resized
from mil_cli.data.tensors import TensorSplit

WHOLE = TensorSplit((torch.arange(11 * 2 * 6 * 4.0).view(11, 2, 6, 4), torch.arange(11), torch.randn(11, 6, 4)))


def test_images_are_means_of_areas_and_all_else_stays() -> None:
    split = Resized(WHOLE, 0.5)
    assert isinstance(split, Split)
    assert len(split) == 11
    for (small, labels, rows), (images, *others) in zip(split.batches(4), WHOLE.batches(4), strict=True):
        assert torch.equal(small, images.view(-1, 2, 3, 2, 2, 2).mean((3, 5)))
        assert torch.equal(labels, others[0])
        assert torch.equal(rows, others[1])


def test_options_reach_the_split() -> None:
    options = {"shuffle": True, "seed": 3, "epoch": 2, "drop_last": True, "skip": 1}
    found = [batch[1].tolist() for batch in Resized(WHOLE, 0.5).batches(4, **options)]
    assert found == [batch[1].tolist() for batch in WHOLE.batches(4, **options)]  # type: ignore[arg-type,index]


@pytest.mark.parametrize(("share", "size"), [(0.5, (3, 2)), (0.3, (2, 1)), (0.01, (1, 1)), (1.0, (6, 4))])
def test_sizes_are_rounded_and_never_none(share: float, size: tuple[int, int]) -> None:
    batch = resized({"image": torch.rand(2, 3, 6, 4), "bytes": torch.ones(2, 3, 6, 4, dtype=torch.uint8)}, share)
    assert batch["image"].shape == (2, 3, *size)  # type: ignore[call-overload]
    assert batch["bytes"].shape == (2, 3, 6, 4)  # type: ignore[call-overload]


def test_the_fingerprint_follows_from_split_and_share() -> None:
    assert Resized(WHOLE, 0.5).fingerprint() == Resized(WHOLE, 0.5).fingerprint()
    assert Resized(WHOLE, 0.5).fingerprint() not in (Resized(WHOLE, 0.25).fingerprint(), WHOLE.fingerprint())
