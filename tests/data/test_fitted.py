"""Images brought to the shape of a model: channels, size, and everything else as it was."""

from __future__ import annotations

import pytest
import torch

from mil_cli.data.augment import Augment
from mil_cli.data.fitted import FittedImages, fit_images
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError


def test_images_of_the_right_shape_stay_themselves() -> None:
    images = torch.rand(3, 2, 5, 4)
    assert fit_images(images, channels=2, size=(5, 4)) is images
    assert fit_images(images, channels=2, size=None) is images


def test_grey_is_repeated_and_colour_averaged() -> None:
    grey = torch.rand(3, 1, 5, 4)
    colour = fit_images(grey, channels=3, size=None)
    assert all(torch.equal(colour[:, channel], grey[:, 0]) for channel in range(3))
    back = fit_images(torch.stack([grey[:, 0], grey[:, 0] + 3, grey[:, 0]], 1), channels=1, size=None)
    torch.testing.assert_close(back, grey + 1)


def test_a_constant_image_is_constant_at_any_size() -> None:
    for size in ((3, 3), (9, 7)):
        fitted = fit_images(torch.full((2, 1, 6, 6), 0.4), channels=1, size=size)
        torch.testing.assert_close(fitted, torch.full((2, 1, *size), 0.4))
    halved = fit_images(torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 8, 16), channels=1, size=(4, 8))
    inner = halved[0, 0, 1, 1:-1]  # a slope stays a slope
    torch.testing.assert_close(inner, torch.arange(2.5, 14, 2.0))


def test_channels_that_cannot_become_others_are_refused() -> None:
    with pytest.raises(DataError, match="images of 4 channels cannot be made images of 3"):
        fit_images(torch.rand(1, 4, 5, 5), channels=3, size=None)


def test_a_split_keeps_its_order_its_labels_and_its_passes() -> None:
    images, labels = torch.rand(10, 1, 6, 6), torch.arange(10)
    split = TensorSplit((images, labels), augment=Augment(flip=True))
    fitted = FittedImages(split, channels=3, size=(4, 4))
    assert len(fitted) == 10
    passes = {"shuffle": True, "augment": True, "seed": 3, "epoch": 1}
    whole = list(fitted.batches(4, **passes))
    for (image, label), (own, own_label) in zip(whole, split.batches(4, **passes), strict=True):  # type: ignore[misc]
        assert torch.equal(image, fit_images(own, channels=3, size=(4, 4)))
        assert torch.equal(label, own_label)
    rest = list(fitted.batches(4, skip=1, **passes))
    assert torch.equal(rest[0][0], whole[1][0])  # type: ignore[index]
    named = FittedImages(TensorSplit({"image": images, "label": labels}), channels=1, size=(3, 3))
    batch = next(iter(named.batches(2)))
    assert batch["image"].shape == (2, 1, 3, 3)  # type: ignore[call-overload]
    assert torch.equal(batch["label"], labels[:2])  # type: ignore[call-overload]


def test_the_fingerprint_follows_content_and_shape() -> None:
    one = TensorSplit((torch.zeros(4, 1, 6, 6), torch.arange(4)))
    other = TensorSplit((torch.ones(4, 1, 6, 6), torch.arange(4)))
    prints = {
        FittedImages(split, channels=channels, size=size).fingerprint()
        for split in (one, other)
        for channels in (1, 3)
        for size in (None, (4, 4))
    }
    assert len(prints) == 8
    assert FittedImages(one, channels=1, size=None).fingerprint() in prints
