"""The sets that ship: digits, Fashion-MNIST, folders of images."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mil_cli.data.base import Data, Split
from mil_cli.data.digits import digits
from mil_cli.data.fashion_mnist import DEBIAN_FOLDER, fashion_mnist, read_idx
from mil_cli.data.source import build_data
from mil_cli.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
needs_fashion_mnist = pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="Fashion-MNIST is not there: apt-get install dataset-fashion-mnist"
)


def _all(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(split.batches(len(split))))  # type: ignore[return-value]


def _keys(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in _all(split)[0]}


class TestDigits:
    def test_the_splits_part_the_whole_set(self) -> None:
        from sklearn.datasets import load_digits

        data = digits()
        assert (len(data.train), len(data.val), len(data.test)) == (1167, 270, 360)
        keys = [_keys(split) for split in (data.train, data.val, data.test)]
        assert not keys[0] & keys[2]
        assert not keys[1] & keys[2]
        labels = torch.cat([_all(split)[1] for split in (data.train, data.val, data.test)])
        assert np.bincount(labels.numpy()).tolist() == np.bincount(load_digits().target).tolist()
        images = _all(data.val)[0]
        assert images.shape == (270, 1, 8, 8)
        assert (float(images.min()), float(images.max())) == (-1.0, 1.0)

    def test_it_is_the_same_every_time(self) -> None:
        first, second = digits(), digits()
        for name in ("train", "val", "test"):
            assert getattr(first, name).fingerprint() == getattr(second, name).fingerprint()

    def test_sizes_out_of_range_are_told(self) -> None:
        with pytest.raises(DataError, match=r"data\.val_samples"):
            digits(val_samples=1500)
        with pytest.raises(DataError, match="at least one"):
            digits(test_samples=0)


class TestFashionMnist:
    @needs_fashion_mnist
    def test_splits(self) -> None:
        data = fashion_mnist(train_samples=2000)
        assert (len(data.train), len(data.val), len(data.test)) == (2000, 10_000, 10_000)
        images, labels = next(iter(data.train.batches(2000)))  # type: ignore[misc]
        assert images.shape == (2000, 1, 28, 28)
        assert abs(float(images.mean())) < 0.05
        assert abs(float(images.std()) - 1) < 0.05
        assert sorted(set(labels.tolist())) == list(range(10))
        again = fashion_mnist(train_samples=1000).train
        assert torch.equal(next(iter(again.batches(1000)))[1], labels[:1000])  # type: ignore[index]

    def test_missing_files_come_with_the_apt_line(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
            fashion_mnist(root=tmp_path)

    def test_idx_round_trip_and_damage(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 256, (7, 3, 4), dtype=np.uint8)
        raw = bytes((0, 0, 8, 3)) + np.array([7, 3, 4], dtype=">u4").tobytes() + values.tobytes()
        path = tmp_path / "x.gz"
        path.write_bytes(gzip.compress(raw))
        assert torch.equal(read_idx(path, dimensions=3), torch.from_numpy(values))
        for damaged, words in (
            (gzip.compress(raw[:-1]), "cut short"),
            (gzip.compress(raw)[:-9], "cannot be read"),
            (b"no gzip at all", "cannot be read"),
            (gzip.compress(b"\0\0\x0d\3" + raw[4:]), "not an IDX file"),
            (gzip.compress(b""), "not an IDX file"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=words):
                read_idx(path, dimensions=3)

    @needs_fashion_mnist
    def test_out_of_range_is_told(self) -> None:
        with pytest.raises(DataError, match="between 1 and 50000"):
            fashion_mnist(train_samples=50_001)


def _write_images(folder: Path, classes: dict[str, int], *, offset: int = 0) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(offset + index + 100 * len(name)).integers(
                0, 256, (9, 12, 3), dtype=np.uint8
            )
            image_module.fromarray(pixels).save(folder / name / f"{index}.png")


class TestImageFolder:
    def _build(self, folder: Path, **settings: Any) -> Data:
        config = {"_target_": "mil_cli.data.image_folder.image_folder", "root": "images", "size": 6, **settings}
        return build_data(config, folder)

    def test_one_folder_per_class_is_split_at_random(self, tmp_path: Path) -> None:
        _write_images(tmp_path / "images", {"cat": 10, "horse": 10})
        data = self._build(tmp_path)
        assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 2)
        images, labels = _all(data.train)
        assert images.shape == (16, 3, 6, 6)
        assert set(labels.tolist()) == {0, 1}
        assert len(_keys(data.train) | _keys(data.val) | _keys(data.test)) == 20
        assert data.train.fingerprint() == self._build(tmp_path).train.fingerprint()
        (tmp_path / "images" / "cat" / "0.png").touch()
        prints = [getattr(self._build(tmp_path), name).fingerprint() for name in ("train", "val", "test")]
        assert prints != [getattr(data, name).fingerprint() for name in ("train", "val", "test")]

    def test_given_splits_are_kept(self, tmp_path: Path) -> None:
        _write_images(tmp_path / "images" / "train", {"a": 8, "bb": 8})
        _write_images(tmp_path / "images" / "test", {"a": 3, "bb": 2}, offset=50)
        data = self._build(tmp_path, channels=1)
        assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 5)
        assert _all(data.test)[0].shape == (5, 1, 6, 6)
        assert _all(data.test)[1].tolist() == [0, 0, 0, 1, 1]

    def test_only_training_is_augmented_and_only_when_asked(self, tmp_path: Path) -> None:
        _write_images(tmp_path / "images", {"cat": 8, "horse": 8})
        train = self._build(tmp_path).train

        def images(**settings: Any) -> torch.Tensor:
            return next(iter(train.batches(12, **settings)))[0]  # type: ignore[index,no-any-return]

        assert torch.equal(images(epoch=0), images(epoch=1))
        assert not torch.equal(images(augment=True, epoch=0), images(augment=True, epoch=1))

    def test_the_middle_is_cut_out(self, tmp_path: Path) -> None:
        image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
        pixels = np.zeros((6, 10, 3), dtype=np.uint8)
        pixels[:, 2:8] = np.arange(6)[None, :, None] * 40
        for name in ("a", "b"):
            (tmp_path / "images" / name).mkdir(parents=True)
            for index in range(3):
                image_module.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
        data = self._build(tmp_path, mean=[0, 0, 0], std=[1, 1, 1])
        expected = torch.from_numpy(pixels[:, 2:8].copy()).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(_all(data.test)[0][0], expected)

    @pytest.mark.parametrize(
        ("layout", "settings", "words"),
        [
            ({}, {}, "no class folders"),
            ({"test": {"a": 1}}, {}, "none for train"),
            ({"train": {"a": 2}, "test": {"b": 2}}, {}, "classes that train lacks: b"),
            ({"train": {"a": 0}}, {}, "no images"),
            ({"train": {"a": 2}}, {"channels": 2}, "data.channels"),
            ({"train": {"a": 2}}, {"mean": [0.5]}, "data.mean"),
            ({"train": {"a": 2}}, {"std": [1, 0, 1]}, "data.std"),
            ({"train": {"a": 2}}, {"root": "elsewhere"}, "folder is missing"),
            ({"train": {"a": 2}}, {"sise": 3}, "did you mean 'size'"),
        ],
    )
    def test_mistakes_are_told(
        self, layout: dict[str, dict[str, int]], settings: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        (tmp_path / "images").mkdir()
        for split, classes in layout.items():
            _write_images(tmp_path / "images" / split, classes)
        with pytest.raises(DataError, match=words):
            self._build(tmp_path, **settings)

    def test_a_file_that_is_no_image_is_named(self, tmp_path: Path) -> None:
        _write_images(tmp_path / "images", {"cat": 5})
        for path in (tmp_path / "images" / "cat").iterdir():
            path.write_bytes(b"broken")
        with pytest.raises(DataError, match=r"image cannot be read.*\.png"):
            self._build(tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_name_what_there_is(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    config = yaml.safe_load(text)
    if path.stem == "fashion_mnist":
        if not DEBIAN_FOLDER.is_dir():
            pytest.skip("Fashion-MNIST is not there: apt-get install dataset-fashion-mnist")
        config["train_samples"] = 10
    if path.stem == "image_folder":
        _write_images(tmp_path / "images", {"a": 5, "b": 5})
        config["root"] = "images"
    assert len(build_data(config, tmp_path).test) > 0
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
