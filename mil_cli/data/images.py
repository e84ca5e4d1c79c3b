"""Image files: which files are images, and decoding them by Pillow with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mil_cli.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


def need_pillow(what: str) -> None:
    """Refuse to go on without Pillow, which decodes images.

    Args:
        what: What needs it, for the message.

    Raises:
        DataError: It is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as problem:
        raise DataError(f"{what} need Pillow", where="data", hint="pip install pillow") from problem


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and all folders below it, in a fixed order."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]


def read_image(path: Path, mode: str) -> Image:
    """Decode an image file.

    Args:
        path: The file.
        mode: As Pillow names it: ``RGB`` or ``L`` (grey).

    Raises:
        DataError: It cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            # Pillow cuts 16-bit grey off at 255, which makes almost all of it white; of 16-bit colour it keeps the
            # high bytes itself.
            grey16 = opened.mode == "I" or opened.mode.startswith("I;16")
            image = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if grey16 else opened
            return image.convert(mode)
    except (OSError, UnidentifiedImageError) as problem:
        raise DataError(
            f"an image cannot be read: {problem}",
            where="data.root",
            value=str(path),
            hint="replace or remove the file",
        ) from problem
