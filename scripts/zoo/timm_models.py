"""timm: of every file of models the one with the fewest parameters."""

from __future__ import annotations

import warnings
from functools import cache

import timm
import torch
from timm.models import list_models, list_modules
from tqdm import tqdm

from scripts.zoo.sample import Sample

_IMAGE = 128
_BATCH = 4


@cache
def names() -> list[str]:
    """Return the smallest model of each file; counting those of timm 1.0 takes some minutes."""
    found = []
    for file in tqdm(list_modules(), desc="timm: counting parameters"):
        # timm's own test models are toys of an architecture, smaller than any that is used
        sizes = {name: _parameters(name) for name in list_models(module=file) if not name.startswith("test_")}
        known = {name: size for name, size in sizes.items() if size}
        if sizes:
            found.append(min(known, key=lambda name: known[name]) if known else next(iter(sizes)))
    return sorted(set(found))


def _parameters(name: str) -> int:
    """Return the number of parameters of a model, 0 where it cannot be made without memory."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())
    except (RuntimeError, NotImplementedError, ValueError):
        return 0


def build(name: str) -> Sample:
    """Make a model and an image batch: its own size where that is fixed or smaller ones fail."""
    module = timm.create_model(name, pretrained=False)
    config = module.pretrained_cfg
    channels, *size = config["input_size"]
    small = [min(_IMAGE, side) for side in size]
    if not config.get("fixed_input_size"):
        images = torch.randn(_BATCH, channels, *small)
        try:
            with torch.no_grad():
                module.eval()(images)
            return Sample(module.train(), (images,))
        except (RuntimeError, AssertionError, ValueError):
            pass  # needs more pixels
    return Sample(module.train(), (torch.randn(_BATCH, channels, *size),))
