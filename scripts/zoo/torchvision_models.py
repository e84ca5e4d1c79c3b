"""torchvision: of every file of classifiers, segmentation and video models the one with the fewest parameters."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torchvision
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models

from scripts.zoo.sample import Sample

_GROUPS = {
    "classification": torchvision.models,
    "segmentation": torchvision.models.segmentation,
    "video": torchvision.models.video,
}
_BATCH = 4
_SHAPES = {"classification": (3, 128, 128), "segmentation": (3, 96, 96), "video": (3, 16, 64, 64)}
_FIXED = {
    "vit_": (3, 224, 224),
    "maxvit": (3, 224, 224),
    "inception": (3, 160, 160),
    "mvit": (3, 16, 224, 224),
    "s3d": (3, 16, 224, 224),
}
"""By the beginning of a model's name: what it takes where that is fixed, or smaller images vanish on the way."""


@cache
def names() -> list[str]:
    """Return the smallest model of each file."""
    smallest: dict[str, tuple[int, str]] = {}
    for name in _group_of():
        file = get_model_builder(name).__module__
        smallest[file] = min(smallest.get(file, (2**63, "")), (_parameters(name), name))
    return sorted(name for _, name in smallest.values())


def build(name: str) -> Sample:
    """Make a model and a batch of images or clips."""
    shape = next((shape for start, shape in _FIXED.items() if name.startswith(start)), _SHAPES[_group_of()[name]])
    return Sample(_make(name).train(), (torch.randn(_BATCH, *shape),))


def _group_of() -> dict[str, str]:
    return {name: group for group, module in _GROUPS.items() for name in list_models(module=module)}


def _make(name: str) -> torch.nn.Module:
    options = {"weights_backbone": None} if _group_of()[name] == "segmentation" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_model(name, weights=None, **options)


def _parameters(name: str) -> int:
    return int(get_model_weights(name).DEFAULT.meta["num_params"])
