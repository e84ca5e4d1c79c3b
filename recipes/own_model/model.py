"""The model to compress: any function or class that returns a torch.nn.Module."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """A small convolutional classifier; put your own model here, it needs no change to be compressed.

    Args:
        width: Channels of the first layer.
        classes: Number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for images of shape (batch, 1, height, width)."""
        return self.classifier(self.features(image).mean(dim=(2, 3)))


def build(width: int = 32, classes: int = 10) -> nn.Module:
    """Build the model; the recipe's keys under `model` are the arguments."""
    return Net(width, classes)
