"""Images shrunk inside the model: as by PyTorch before it, for any batch, in archives too, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.graph.resolution import at_resolution, first_image
from mil_cli.models.resnet import resnet20


class TwoImages(nn.Module):
    """Takes two images of different sizes, numbers, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, numbers: Tensor, image: Tensor, other: Tensor, nothing: None = None) -> dict[str, Tensor]:
        return {"sum": self.first(image).mean((2, 3)) + self.second(other).mean((2, 3)) * numbers[:, :4]}


def _shapes(model: Model) -> list[str]:
    """Return the shapes that the convolutions of a model are known to give, symbols of batches included."""
    return [str(node.meta["val"].shape) for node in calls(model.graph) if op_name(node) == "conv2d"]


def test_it_is_what_pytorch_gives_on_smaller_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = resnet20(width=8, blocks=1).eval()
    model = Model.capture(module, (torch.randn(2, 1, 28, 28),))
    before = model.fingerprint()
    small = at_resolution(model, 20 / 28)
    assert model.fingerprint() == before
    x = torch.randn(7, 1, 28, 28)
    expected = module(nn.functional.interpolate(x, size=20, mode="bilinear"))
    assert torch.equal(small(x), expected)
    taken = Model.capture(module, (torch.randn(2, 1, 20, 20),))
    assert small.macs() == taken.macs()
    assert small.spec == model.spec
    small.save(tmp_path / "small.pt2")
    assert torch.equal(Model.load(tmp_path / "small.pt2")(x), expected)
    assert _shapes(small) == _shapes(taken)


def test_all_images_shrink_alike_and_nothing_else_does() -> None:
    torch.manual_seed(0)
    module = TwoImages().eval()
    model = Model.capture(module, (torch.randn(2, 6), torch.randn(2, 1, 12, 16), torch.randn(2, 3, 9, 9)))
    assert first_image(model).name == "image"
    small = at_resolution(model, 0.5)
    numbers, image, other = torch.randn(3, 6), torch.randn(3, 1, 12, 16), torch.randn(3, 3, 9, 9)
    resize = nn.functional.interpolate
    expected = module(numbers, resize(image, size=(6, 8), mode="bilinear"), resize(other, size=(4, 4), mode="bilinear"))
    assert torch.equal(small(numbers, image, other)["sum"], expected["sum"])


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Linear(8, 2), (2, 8), "takes no images of a fixed height and width"),
        (nn.Conv2d(1, 2, 3, padding=1), (2, 1, 8, 8), "its outputs would have other sizes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (2, 1, 8, 8), "does not run on smaller images"),
    ],
)
def test_what_cannot_see_less_says_why(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    model = Model.capture(module.eval(), (torch.randn(*shape),))
    with pytest.raises(ModelError, match=reason):
        at_resolution(model, 0.5)


def test_images_of_any_size_are_left_to_the_caller() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    dynamic = {"input": {0: "batch", 2: "height", 3: "width"}}
    model = Model.capture(net.eval(), (torch.randn(2, 1, 8, 8),), dynamic=dynamic)
    with pytest.raises(ModelError, match="takes no images of a fixed height and width"):
        first_image(model)
