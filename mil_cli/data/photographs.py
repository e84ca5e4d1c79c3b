"""Real photographs, of four Debian packages of wallpapers or of a folder, and random crops of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mil_cli.data.images import SUFFIXES, images_below, need_pillow, read_image
from mil_cli.errors import DataError

SPLITS = ("train", "val", "test")

# As the packages are in Debian 12; drawings and renderings in them are left out. Val has photographs of its own, so as
# to judge on scenes that training has not seen.
_PLASMA = "plasma-workspace-wallpapers", "/usr/share/wallpapers/{}/contents/images/2560x1600.jpg"
_MATE = "mate-backgrounds", "/usr/share/backgrounds/mate/nature/{}.jpg"
_LOMIRI_16 = "lomiri-wallpapers-16.04", "/usr/share/backgrounds/{}.jpg"
_LOMIRI_20 = "lomiri-wallpapers-20.04", "/usr/share/backgrounds/{}.jpg"
_DEBIAN: Mapping[str, Mapping[tuple[str, str], str]] = {
    "train": {
        _PLASMA: "Autumn BytheWater ColorfulCups DarkestHour FallenLeaf Grey Kite OneStandsOut summer_1am",
        _MATE: "Aqua Blinds FreshFlower Garden GreenMeadow LadyBird Storm TwoWings Wood YellowFlower",
    },
    "val": {_PLASMA: "ColdRipple EveningGlow Path", _MATE: "Dune RainDrops"},
    "test": {
        _LOMIRI_16: "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
        "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi",
        _LOMIRI_20: "Kleiber_by_Lukas_Baubkus",
    },
}
PACKAGES = tuple(sorted({package for groups in _DEBIAN.values() for package, _ in groups}))


def photographs(split: str, *, root: str | Path | None = None, longer_side: int = 960) -> list[torch.Tensor]:
    """Load the photographs of a split, shrunk by averaging: that also takes most of the noise and JPEG blocks away.

    Args:
        split: ``train``, ``val`` or ``test``; no photograph is in two of them.
        root: A folder with images in ``train``, ``val`` and ``test``; by default the photographs of Debian's packages.
        longer_side: What the longer side is shrunk to, in pixels; smaller photographs stay as they are.

    Returns:
        uint8 tensors of shape (3, height, width), in a fixed order.

    Raises:
        DataError: Pillow or a file is missing, or a file is no image.
    """
    need_pillow("photographs")
    if longer_side < 1:
        raise DataError("must be at least 1 pixel", where="data.longer_side", value=longer_side)
    files = _debian_files(split) if root is None else _files_below(Path(root) / split)
    return [_load(file, longer_side) for file in files]


def missing_packages() -> list[str]:
    """Return the Debian packages of whose photographs one is not here."""
    return sorted({package for split in SPLITS for package, file in _debian_by_package(split) if not file.is_file()})


def random_crop(images: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Cut a square out of one of several photographs, each choice by torch's global generator; mirrored half the time.

    Args:
        images: Of shape (channels, height, width).
        size: Side of the square, in pixels.

    Returns:
        Shape (channels, size, size), the dtype of the photographs.

    Raises:
        DataError: The chosen photograph is smaller.
    """
    chosen, row, column, mirror = torch.rand(4).tolist()
    image = images[int(chosen * len(images))]
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise DataError(
            f"a photograph of {width}x{height} pixels is smaller than the crops",
            where="data.size",
            value=size,
            hint="take larger photographs, or smaller crops",
        )
    top, left = int(row * (height - size + 1)), int(column * (width - size + 1))
    crop = image[..., top : top + size, left : left + size]
    return crop.flip(-1) if mirror < 0.5 else crop


def _debian_by_package(split: str) -> list[tuple[str, Path]]:
    return [
        (package, Path(pattern.format(name)))
        for (package, pattern), names in _DEBIAN[split].items()
        for name in names.split()
    ]


def _debian_files(split: str) -> list[Path]:
    files = _debian_by_package(split)
    for package, file in files:
        if not file.is_file():
            raise DataError(
                f"a photograph of the Debian package {package} is missing",
                where="data.root",
                value=str(file),
                hint=f"apt-get install {' '.join(PACKAGES)} (Debian 12), or set data.root to a folder with images of "
                "your own in train, val and test",
            )
    return [file for _, file in files]


def _files_below(folder: Path) -> list[Path]:
    files = images_below(folder)
    if not files:
        raise DataError(
            f"no images ({', '.join(sorted(SUFFIXES))})",
            where="data.root",
            value=str(folder),
            hint="lay photographs out in the folders train, val and test below data.root",
        )
    return files


def _load(file: Path, longer_side: int) -> torch.Tensor:
    from PIL import Image

    image = read_image(file, "RGB")
    factor = max(1.0, max(image.size) / longer_side)
    size = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
    pixels = np.array(image.resize(size, Image.Resampling.BOX))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
