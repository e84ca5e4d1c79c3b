"""Batches that are changed as they come: deterministic, resumed exactly, and told apart by name."""

from __future__ import annotations

import torch

from mil_cli.data.augment import Augment
from mil_cli.data.base import Batch, Data, Split
from mil_cli.data.changed import Changed, with_train
from mil_cli.data.tensors import TensorSplit


def _noisy(batch: Batch, generator: torch.Generator) -> Batch:
    images, labels = batch  # type: ignore[misc]
    return images + torch.rand(len(images), generator=generator).view(-1, 1, 1, 1), labels


def _split(name: str = "noise") -> Changed:
    images = torch.arange(23.0 * 16).reshape(23, 1, 4, 4)
    return Changed(TensorSplit((images, torch.arange(23)), augment=Augment(crop_padding=1)), _noisy, name=name)


def _images(**options: object) -> list[torch.Tensor]:
    return [images for images, _ in _split().batches(5, augment=True, seed=3, **options)]  # type: ignore[misc,arg-type]


def test_a_resumed_pass_goes_on_alike() -> None:
    assert isinstance(_split(), Split)
    whole, rest = _images(epoch=2, shuffle=True), _images(epoch=2, shuffle=True, skip=3)
    assert len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_draws_follow_epoch_number_and_shard() -> None:
    batches = [*_images(epoch=0), *_images(epoch=1), *_images(epoch=0, shard=(1, 2))]
    assert len({float(images[0, 0, 0, 0] % 1) for images in batches}) == 15


def test_without_augmentation_nothing_is_changed() -> None:
    images, _ = next(iter(_split().batches(23)))  # type: ignore[misc]
    assert torch.equal(images, torch.arange(23.0 * 16).reshape(23, 1, 4, 4))


def test_the_fingerprint_follows_from_split_and_change() -> None:
    assert _split().fingerprint() == _split().fingerprint() != _split("other").fingerprint()


def test_only_the_training_split_is_replaced() -> None:
    split, other = TensorSplit((torch.zeros(3),)), TensorSplit((torch.ones(3),))
    data = with_train(Data(name="toy", train=split, val=split, test=split), other)
    assert (data.train, data.val, data.test, data.name) == (other, split, split, "toy")
