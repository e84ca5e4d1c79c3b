"""Decoding of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mil_cli.data.images import read_image

image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")


def test_grey_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image_module.fromarray(values).save(tmp_path / "deep.png")
    for mode in ("L", "RGB"):
        pixels = np.asarray(read_image(tmp_path / "deep.png", mode))
        assert np.array_equal(pixels.reshape(8, 8, -1)[..., 0], values >> 8)
