"""Photographs: the splits share none, shrinking averages, crops are cut true and come from everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mil_cli.cli import doctor
from mil_cli.cli.doctor import State
from mil_cli.data import photographs as module
from mil_cli.data.photographs import PACKAGES, SPLITS, missing_packages, photographs, random_crop
from mil_cli.errors import DataError


def write(path: Path, pixels: np.ndarray) -> np.ndarray:
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    images.fromarray(pixels).save(path)
    return pixels


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_folder_of_ones_own_is_read_in_a_fixed_order(tmp_path: Path) -> None:
    second = write(tmp_path / "val/b.png", noise(4, 6, 1))
    first = write(tmp_path / "val/a/z.png", noise(5, 3, 2))
    (tmp_path / "val/notes.txt").write_text("no image")
    found = photographs("val", root=tmp_path)
    assert [tuple(image.shape) for image in found] == [(3, 5, 3), (3, 4, 6)]
    for image, pixels in zip(found, (first, second), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_shrinking_takes_the_mean_of_whole_blocks(tmp_path: Path) -> None:
    pixels = write(tmp_path / "train/a.png", noise(8, 24))
    (image,) = photographs("train", root=tmp_path, longer_side=12)
    means = pixels.reshape(4, 2, 12, 2, 3).mean((1, 3))
    assert tuple(image.shape) == (3, 4, 12)
    assert np.abs(image.permute(1, 2, 0).numpy() - means).max() <= 1  # rounded after either axis


def test_bad_folders_and_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        photographs("test", root=tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot be read.*a\.jpg"):
        photographs("test", root=tmp_path)
    with pytest.raises(DataError, match="longer_side"):
        photographs("test", root=tmp_path, longer_side=0)


def test_missing_packages_come_with_the_apt_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = ("here", f"{tmp_path}/{{}}.png"), ("away", f"{tmp_path}/none/{{}}.png")
    monkeypatch.setattr(module, "_DEBIAN", {"train": {here: "a b"}, "val": {here: "a"}, "test": {away: "c"}})
    for name in "ab":
        write(tmp_path / f"{name}.png", noise(3, 3))
    assert missing_packages() == ["away"]
    assert len(photographs("train")) == 2
    with pytest.raises(DataError, match="package away is missing") as caught:
        photographs("test")
    assert all(package in str(caught.value) for package in ("apt-get install", *PACKAGES))
    finding = list(doctor.check_data())[-1]
    assert finding.state is State.NOTE
    assert "apt-get install away" in finding.remedy


@pytest.mark.skipif(bool(missing_packages()), reason=f"photographs are missing: apt-get install {' '.join(PACKAGES)}")
def test_debians_photographs_are_in_one_split_each() -> None:
    files = {split: module._debian_files(split) for split in SPLITS}
    assert {split: len(found) for split, found in files.items()} == {"train": 19, "val": 5, "test": 14}
    contents = [path.read_bytes() for found in files.values() for path in found]
    assert len(set(contents)) == len(contents)
    for image in photographs("val"):
        assert image.dtype is torch.uint8
        assert max(image.shape) == 960


class TestCrops:
    def test_a_crop_is_a_window_of_a_photograph_or_of_its_mirror(self) -> None:
        images = [torch.from_numpy(noise(7, 9, seed)).permute(2, 0, 1) for seed in (0, 1)]
        windows = {
            version[:, row : row + 4, column : column + 4].numpy().tobytes(): (number, mirrored)
            for number, image in enumerate(images)
            for mirrored, version in enumerate((image, image.flip(-1)))
            for row in range(4)
            for column in range(6)
        }
        torch.manual_seed(0)
        seen = [random_crop(images, 4).numpy().tobytes() for _ in range(2000)]
        assert set(seen) == set(windows)  # nothing else, and every window is reached
        assert sum(windows[crop][0] for crop in seen) == pytest.approx(1000, abs=110)
        assert sum(windows[crop][1] for crop in seen) == pytest.approx(1000, abs=110)

    def test_torchs_generator_decides(self) -> None:
        images = [torch.from_numpy(noise(30, 30)).permute(2, 0, 1)]
        drawn = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            drawn.append(random_crop(images, 5))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_photographs_smaller_than_the_crop_are_told(self) -> None:
        with pytest.raises(DataError, match=r"data\.size: .*9x7 pixels is smaller"):
            random_crop([torch.zeros(3, 7, 9)], 8)
