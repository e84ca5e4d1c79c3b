"""A small valid recipe to break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
defaults:
  - /mil/defaults
  - /model: convnet
  - /data: digits
  - /task: classification
  - /device: host_cpu
  - /stage/prune@stages.prune: magnitude
  - /stage/distill@stages.recover: soft_labels
  - /stage/quantize@stages.quantize: static
  - _self_
goals:
  quality: {max_drop: 1%}
  size: {max: 100 kB}
  latency: {max_ratio: 0.5}
chain: [prune, recover, quantize]
stages:
  prune: {macs: 0.5}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe; pairs (old, new) change the valid one first."""

    def writer(*changes: tuple[str, str], text: str = RECIPE, name: str = "recipe.yaml") -> Path:
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return writer
