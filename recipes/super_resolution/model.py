"""A plain net that doubles the resolution of photographs: it adds to bicubic interpolation what that lacks.

Convolutions at the low resolution and a shuffle of channels into pixels (Shi et al. 2016, arXiv:1609.05158), which
learn the difference from the interpolated image alone (Kim et al. 2016, arXiv:1511.04587).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

SCALE = 2


class PlainNet(nn.Module):
    """Convolutions and rectifiers, and the shuffle of channels into pixels.

    Args:
        width: Channels of the convolutions.
        layers: Convolutions between the first and the last.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [3] + [width] * (layers + 1)
        self.features = nn.Sequential()
        for inputs, outputs in pairwise(widths):
            self.features.extend([nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()])
        self.last = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Return images of shape (batch, 3, 2 height, 2 width) for images of shape (batch, 3, height, width)."""
        details = functional.pixel_shuffle(self.last(self.features(image)), SCALE)
        return details + functional.interpolate(image, scale_factor=float(SCALE), mode="bicubic")


def build(width: int = 32, layers: int = 5) -> nn.Module:
    """Build the model: 51,000 weights by default."""
    return PlainNet(width, layers)
