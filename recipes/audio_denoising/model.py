"""A causal mask estimator for streams: dilated convolutions over time whose past frames the caller keeps.

The temporal convolutional net of Conv-TasNet (Luo and Mesgarani 2019, arXiv:1809.07454) on short-time spectra, with
full convolutions instead of depthwise ones, and without look-ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

KERNEL = 3
_FLOOR = 1e-3  # added to magnitudes before their logarithm


class Block(nn.Module):
    """A dilated convolution over the past and the present, a rectifier and a 1x1 convolution, around a shortcut.

    Args:
        channels: Channels that come in and go out.
        hidden: Channels in between.
        dilation: Frames from one tap of the convolution to the next.
    """

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.past = (KERNEL - 1) * dilation
        self.body = nn.Sequential(
            nn.Conv1d(channels, hidden, KERNEL, dilation=dilation, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Conv1d(hidden, channels, 1, bias=False),
            nn.BatchNorm1d(channels),
        )

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of the same frames, and the last `past` frames of what came in."""
        seen = torch.cat([past, x], dim=2)
        return x + self.body(seen), seen[:, :, -self.past :]


class Denoiser(nn.Module):
    """Estimates how much of each frequency is speech, frame by frame.

    Args:
        bins: Frequencies of a frame.
        channels: Channels between the blocks; also those of the state.
        hidden: Channels within the blocks.
        blocks: Number of blocks; each looks twice as far back as the one before.
    """

    def __init__(self, bins: int, channels: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(bins, channels, 1, bias=False), nn.BatchNorm1d(channels))
        self.blocks = nn.ModuleList(Block(channels, hidden, 2**index) for index in range(blocks))
        self.decoder = nn.Conv1d(channels, bins, 1)
        self.lengths = [2**index * (KERNEL - 1) for index in range(blocks)]
        self.state_shape = [channels, sum(self.lengths)]

    def forward(self, magnitude: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the masks of some frames that follow on those seen before.

        Args:
            magnitude: Of the noisy spectrum, shape (batch, bins, frames); any number of frames.
            state: What the call before returned, zeros at the start of a stream; shape (batch, channels, past), where
                past counts the frames that all blocks together look back.

        Returns:
            The masks in [0, 1], of the shape of the magnitudes, and the state for the next call.

        Raises:
            ValueError: The state is of another shape.
        """
        if list(state.shape[1:]) != self.state_shape:
            raise ValueError(f"the state has other sizes: set task.state_shapes to [{self.state_shape}]")
        x = self.encoder(torch.log(magnitude + _FLOOR))
        kept = []
        for block, past in zip(self.blocks, state.split(self.lengths, dim=2), strict=True):
            x, seen = block(x, past)
            kept.append(seen)
        return torch.sigmoid(self.decoder(functional.relu(x))), torch.cat(kept, dim=2)


def build(bins: int = 129, channels: int = 48, hidden: int = 160, blocks: int = 6) -> nn.Module:
    """Build the model; with `blocks` of them the state holds 2 * (2 ** blocks - 1) frames."""
    return Denoiser(bins, channels, hidden, blocks)
