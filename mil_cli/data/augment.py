"""Augmentation of whole image batches, vectorised: random crop, horizontal flip, cutout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from mil_cli.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a batch of images of shape (batch, channels, height, width), any dtype.

    Attributes:
        crop_padding: Pixels of padding on each side from which a window of the old size is cut (0: off); a random
            shift by up to that many pixels.
        flip: Whether to mirror left and right with probability one half.
        cutout: Side in pixels of a square that is blanked at a random place (0: off; DeVries and Taylor 2017,
            "Improved Regularization of Convolutional Neural Networks with Cutout").
        fill: The value of padding and blanked pixels, in the units of the batch.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    fill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise DataError("must be a whole number of pixels, 0 or more", where=f"data.{name}", value=value)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the augmented batch.

        Args:
            images: Shape (batch, channels, height, width).
            generator: Where the randomness comes from.

        Raises:
            DataError: The batch is not one of images.
        """
        if images.ndim != 4:
            raise DataError(
                "augmentation needs images of shape (batch, channels, height, width)",
                where="data",
                value=tuple(images.shape),
                hint="switch the augmentation off",
            )
        if self.crop_padding:
            images = self._crop(images, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.cutout:
            images = self._blank(images, generator)
        return images

    def _crop(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch, _, height, width = images.shape
        reach = self.crop_padding
        offsets = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator)
        padded = functional.pad(images, (reach, reach, reach, reach), value=self.fill)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(batch), :, offsets[0], offsets[1]]

    def _blank(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch, _, height, width = images.shape
        centre_y = torch.randint(0, height, (batch, 1), generator=generator)
        centre_x = torch.randint(0, width, (batch, 1), generator=generator)
        before, after = self.cutout // 2, self.cutout - self.cutout // 2
        rows, columns = torch.arange(height), torch.arange(width)
        in_rows = (rows >= centre_y - before) & (rows < centre_y + after)
        in_columns = (columns >= centre_x - before) & (columns < centre_x + after)
        hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
        return images.masked_fill(hole, self.fill)
