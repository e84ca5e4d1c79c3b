"""The in-memory split: determinism, exact resume, shards, augmentation."""

from __future__ import annotations

import itertools

import pytest
import torch

from mil_cli.data.augment import Augment
from mil_cli.data.base import Split, batch_length, halves, mix_seed, part_of
from mil_cli.data.tensors import Normalise, TensorSplit
from mil_cli.errors import DataError


def _split(samples: int = 23, **settings: object) -> TensorSplit:
    images = torch.arange(samples * 2 * 4 * 5, dtype=torch.float32).reshape(samples, 2, 4, 5)
    return TensorSplit((images, torch.arange(samples)), **settings)  # type: ignore[arg-type]


def _labels(split: TensorSplit, **settings: object) -> list[list[int]]:
    return [batch[1].tolist() for batch in split.batches(5, **settings)]  # type: ignore[index,arg-type]


def test_one_pass_gives_each_sample_once_and_its_own_label() -> None:
    split = _split()
    assert isinstance(split, Split)
    seen = []
    for images, labels in split.batches(5, shuffle=True, seed=3, epoch=2):
        seen += labels.tolist()
        torch.testing.assert_close(images[:, 0, 0, 0], labels * 40.0)
    assert sorted(seen) == list(range(23))
    assert seen != sorted(seen)


def test_order_follows_seed_and_epoch_only() -> None:
    split = _split()
    orders = {(s, e): str(_labels(split, shuffle=True, seed=s, epoch=e)) for s, e in itertools.product((0, 1), (0, 1))}
    assert len(set(orders.values())) == 4
    assert orders[1, 1] == str(_labels(_split(), shuffle=True, seed=1, epoch=1))
    assert _labels(split, seed=1, epoch=1) == _labels(split)
    state = torch.get_rng_state()
    _labels(split, shuffle=True, augment=True)
    assert torch.equal(state, torch.get_rng_state())


def test_skipping_gives_the_rest_of_the_same_pass() -> None:
    split = _split(augment=Augment(crop_padding=1, flip=True, cutout=2))
    settings = {"shuffle": True, "augment": True, "seed": 5, "epoch": 1}
    whole = list(split.batches(4, **settings))  # type: ignore[arg-type]
    rest = list(split.batches(4, skip=2, **settings))  # type: ignore[arg-type]
    assert len(rest) == len(whole) - 2
    for left, right in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_last_batch_that_is_not_full_can_be_left_out() -> None:
    assert [len(batch) for batch in _labels(_split())] == [5, 5, 5, 5, 3]
    assert [len(batch) for batch in _labels(_split(), drop_last=True)] == [5, 5, 5, 5]


def test_shards_part_each_batch() -> None:
    split = _split(20)
    whole = _labels(split, shuffle=True)
    parts = [_labels(split, shuffle=True, shard=(rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == sorted(batch)
        assert not set(first) & set(second)


def test_dicts_stay_dicts() -> None:
    split = TensorSplit({"x": torch.zeros(4, 2), "y": torch.arange(4)})
    batch = next(iter(split.batches(3)))
    assert isinstance(batch, dict)
    assert batch["y"].tolist() == [0, 1, 2]
    assert batch_length(batch) == 3


def test_a_model_that_writes_into_its_input_does_not_reach_the_data() -> None:
    split = _split()
    before = split.fingerprint()
    for images, _ in split.batches(8):
        images.zero_()
    assert float(next(iter(split.batches(8)))[0].abs().sum()) > 0  # type: ignore[index]
    assert split.fingerprint() == before


def test_the_fingerprint_follows_content_and_preparation() -> None:
    base = _split().fingerprint()
    assert base == _split().fingerprint()
    assert base != _split(22).fingerprint()
    assert base != _split(augment=Augment(flip=True)).fingerprint()
    assert base != _split(prepare=Normalise([0, 0], [1, 1])).fingerprint()
    assert (
        _split(prepare=Normalise([0, 0], [1, 2])).fingerprint()
        != _split(prepare=Normalise([0, 0], [1, 1])).fingerprint()
    )


def test_normalise_is_by_channel() -> None:
    images = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    made = Normalise([10, 20], [2, 5])(images)
    torch.testing.assert_close(made[:, 0], (images[:, 0].float() - 10) / 2)
    torch.testing.assert_close(made[:, 1], (images[:, 1].float() - 20) / 5)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((torch.zeros(3, 1), torch.zeros(4)), "differ in length"),
        ((torch.zeros(0, 1), torch.zeros(0)), "empty"),
        ((), "holds nothing"),
        ((torch.tensor([[1.0], [float("nan")]]), torch.zeros(2)), "first in sample 1"),
        ((torch.tensor(1.0),), "along axis 0"),
    ],
)
def test_bad_tensors_are_told(tensors: tuple[torch.Tensor, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        TensorSplit(tensors)


class TestAugment:
    def test_a_crop_is_a_window_of_the_padded_image(self) -> None:
        images = torch.randn(40, 2, 4, 5)
        made = Augment(crop_padding=2, fill=9.0)(images, torch.Generator().manual_seed(0))
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=9.0)
        shifts = set()
        for image, original in zip(made, padded, strict=True):
            found = [
                (y, x) for y in range(5) for x in range(5) if torch.equal(original[:, y : y + 4, x : x + 5], image)
            ]
            assert found
            shifts.add(found[0])
        assert len(shifts) > 10

    def test_a_flip_mirrors_about_half(self) -> None:
        images = torch.randn(200, 1, 3, 4)
        made = Augment(flip=True)(images, torch.Generator().manual_seed(0))
        mirrored = sum(torch.equal(a, b.flip(-1)) for a, b in zip(made, images, strict=True))
        same = sum(torch.equal(a, b) for a, b in zip(made, images, strict=True))
        assert mirrored + same == 200
        assert 70 < mirrored < 130

    def test_a_cutout_blanks_a_square(self) -> None:
        images = torch.ones(50, 2, 8, 8)
        made = Augment(cutout=4, fill=-1.0)(images, torch.Generator().manual_seed(0))
        for image in made:
            hole = (image == -1).all(0)
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert int(hole.sum()) == int(rows * columns)
            assert 2 <= int(rows) <= 4
            assert bool((image[:, ~hole] == 1).all())

    def test_bytes_stay_bytes(self) -> None:
        images = torch.randint(0, 256, (4, 1, 6, 6), dtype=torch.uint8)
        made = Augment(crop_padding=1, flip=True, cutout=2)(images, torch.Generator())
        assert made.dtype == torch.uint8

    def test_what_is_no_image_is_told(self) -> None:
        with pytest.raises(DataError, match="images of shape"):
            Augment(flip=True)(torch.zeros(3, 4), torch.Generator())
        with pytest.raises(DataError, match="0 or more"):
            Augment(cutout=-1)
        with pytest.raises(DataError, match="whole number"):
            Augment(crop_padding=1.5)  # type: ignore[arg-type]


def test_mixed_seeds_do_not_collide() -> None:
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_halves_have_each_sample_once_by_the_seed() -> None:
    split = TensorSplit({"x": torch.arange(9.0)[:, None], "y": torch.arange(9)})
    one, other = halves(split, seed=3)
    held = [next(iter(half.batches(9)))["y"] for half in (one, other)]  # type: ignore[call-overload]
    assert sorted(torch.cat(held).tolist()) == list(range(9))
    assert len(one) == 4
    assert torch.equal(next(iter(halves(split, seed=3)[0].batches(9)))["y"], held[0])  # type: ignore[call-overload]
    assert not torch.equal(next(iter(halves(split, seed=4)[0].batches(9)))["y"], held[0])  # type: ignore[call-overload]


def test_a_part_is_augmented_and_prepared_as_the_whole_is() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (6, 1, 8, 8), generator=generator, dtype=torch.uint8)
    settings = {"augment": Augment(crop_padding=2), "prepare": Normalise([100.0], [50.0])}
    whole = TensorSplit((images, torch.arange(6)), **settings)  # type: ignore[arg-type]
    taken = whole.part(torch.tensor([4, 1]))
    alone = TensorSplit((images[[4, 1]], torch.tensor([4, 1])), **settings)  # type: ignore[arg-type]
    for options in ({}, {"augment": True, "shuffle": True, "seed": 5}):
        for given, expected in zip(taken.batches(2, **options), alone.batches(2, **options), strict=True):  # type: ignore[arg-type]
            assert torch.equal(given[0], expected[0])  # type: ignore[index]
            assert torch.equal(given[1], expected[1])  # type: ignore[index]


def test_what_cannot_be_divided_is_told() -> None:
    class Own:
        def __len__(self) -> int:
            return 4

    with pytest.raises(DataError, match="cannot be divided"):
        part_of(Own(), torch.arange(2))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="too few samples to divide"):
        halves(TensorSplit((torch.zeros(1, 2),)), seed=0)
