"""The built-in architectures: sizes against hand counts, capture, and settings out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.models.convnet import convnet
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.slimmable_resnet import slimmable_resnet
from mil_cli.models.small_nets import small_nets
from mil_cli.models.source import ModelSource, build_model
from mil_cli.models.vit import vit
from mil_cli.spaces.largest import largest

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
BUILDERS = {builder.__name__: builder for builder in (convnet, mobilenet, resnet20, slimmable_resnet, small_nets, vit)}


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet20_has_the_published_size() -> None:
    # He et al. 2016, table 6: 0.27 M parameters with CIFAR's three channels.
    assert _params(resnet20(in_channels=3)) == pytest.approx(0.27e6, rel=0.03)
    convolutions = [m for m in resnet20().modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20


def test_resnet20_width_stride_and_depth() -> None:
    wide = resnet20(width=32, stem_stride=2)
    assert _params(wide) == pytest.approx(1.08e6, rel=0.01)
    x = torch.zeros(2, 1, 28, 28)
    assert wide.stem(x).shape == (2, 32, 14, 14)
    assert wide(x).shape == (2, 10)
    assert _params(resnet20(width=16)) == _params(resnet20(widths=[16, 32, 64]))
    eight = [m for m in resnet20(blocks=1).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(eight) + 1 == 8


def test_vit_size_by_hand() -> None:
    dim, depth, tokens = 8, 2, 49
    block = 2 * 2 * dim + (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (dim * 16 + 16) + (16 * dim + dim)
    expected = (16 * dim + dim) + tokens * dim + depth * block + 2 * dim + (dim * 10 + 10)
    assert _params(vit(dim=dim, depth=depth, heads=2, mlp_ratio=2.0)) == expected


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_build_capture_and_agree_with_eager(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    source = ModelSource.model_validate(yaml.safe_load(text))
    side = 8 if path.stem == "convnet" else 28
    x = torch.randn(3, 1, side, side)
    model = build_model(source, root=tmp_path, example=((x,), {}), seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        eager = largest(BUILDERS[path.stem]()).eval()  # type: ignore[operator]
    other = torch.randn(5, 1, side, side)
    torch.testing.assert_close(model(other), eager(other), rtol=0, atol=1e-6)
    assert model.spec.batch is not None
    assert set(model.state_dict()) == set(eager.state_dict())


@pytest.mark.parametrize(
    ("builder", "settings", "words"),
    [
        (resnet20, {"width": 0}, r"model.widths\[0\]"),
        (resnet20, {"blocks": [3, 3]}, "model.blocks"),
        (resnet20, {"widths": []}, "at least one stage"),
        (resnet20, {"stem_stride": True}, "model.stem_stride"),
        (mobilenet, {"widths": [8], "blocks": [1, 1]}, "1 stages need 1"),
        (mobilenet, {"dropout": 1.0}, "model.dropout"),
        (vit, {"patch": 5}, "must divide the image's side"),
        (vit, {"heads": 5}, "must divide the tokens' channels"),
        (vit, {"mlp_ratio": 0}, "model.mlp_ratio"),
        (convnet, {"pool_after": [3]}, "convolutions 0 to 2"),
        (convnet, {"widths": []}, "at least one"),
        (convnet, {"hidden": -1}, "negative"),
    ],
)
def test_settings_out_of_range_are_told(builder: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        builder(**settings)
