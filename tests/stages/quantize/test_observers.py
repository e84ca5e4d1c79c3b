from __future__ import annotations

import io
import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mil_cli.stages.quantize.observers import ObserverName, make_observer
from mil_cli.stages.quantize.observers.channels import ChannelMean
from mil_cli.stages.quantize.observers.entropy import Entropy, divergence
from mil_cli.stages.quantize.observers.histogram import Histogram
from mil_cli.stages.quantize.observers.moving_average import MovingAverage
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.observers.percentile import Percentile
from mil_cli.stages.quantize.ranges import CodeRange, activation_codes, affine_parameters, weight_codes

UNSIGNED = activation_codes(8, signed=False)


def stream(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 50, generator=generator) * scale for scale in (0.1, 1.0, 3.0, 0.5)]
    if kind == "rectified":
        batches = [batch.relu() for batch in batches]
    if kind == "outlier":
        batches[2][0, 0] = 100.0
    return batches


def squared_error(values: Tensor, low: float, high: float, codes: CodeRange) -> float:
    scale, zero_point = affine_parameters(low, high, codes)
    rounded = ((values.double() / scale).round() + zero_point).clamp(codes.quant_min, codes.quant_max)
    return float((((rounded - zero_point) * scale) - values).square().sum())


@pytest.mark.parametrize("name", get_args(ObserverName))
def test_no_observer_keeps_more_after_more_batches(name: ObserverName) -> None:
    observer = make_observer(name, codes=UNSIGNED, percentile=99.9)

    def kept() -> int:
        buffer = io.BytesIO()
        torch.save(vars(observer), buffer)
        return buffer.tell()

    sizes = []
    for batch in stream("normal") * 5:
        observer.update(batch)
        sizes.append(kept())
    assert max(sizes[4:]) <= max(sizes[:4]) + 16  # a float may be written in more digits, not a batch of 2,000 of them


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier"])
def test_min_max_is_the_range_of_all_batches(kind: str) -> None:
    observer = make_observer("min_max", codes=UNSIGNED, percentile=99.9)
    for batch in stream(kind):
        observer.update(batch)
    everything = torch.cat(stream(kind))
    assert observer.range() == (float(everything.min()), float(everything.max()))


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier"])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys_to_one_bin(kind: str, percentile: float) -> None:
    observer = Percentile(percentile)
    for batch in stream(kind):
        observer.update(batch)
    everything = torch.cat(stream(kind)).double().numpy()
    low, high = observer.range()
    width = observer._histogram.bin_width
    assert np.percentile(everything, 100 - percentile, method="lower") - width <= low
    assert low <= np.percentile(everything, 100 - percentile, method="higher") + width
    assert np.percentile(everything, percentile, method="lower") - width <= high
    assert high <= np.percentile(everything, percentile, method="higher") + width


def test_percentile_100_is_min_max() -> None:
    observer = Percentile(100)
    for batch in stream("normal"):
        observer.update(batch)
    everything = torch.cat(stream("normal"))
    assert observer.range() == (float(everything.min()), float(everything.max()))


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_close_to_brute_force(kind: str, bits: int) -> None:
    codes = activation_codes(bits, signed=False)
    observer = MeanSquaredError(codes)
    for batch in stream(kind):
        observer.update(batch)
    everything = torch.cat(stream(kind))
    lowest, highest = min(float(everything.min()), 0.0), float(everything.max())
    candidates = [
        squared_error(everything, lowest * below / 60, highest * above / 60, codes)
        for below in range(0, 61, 1 if lowest < 0 else 61)
        for above in range(1, 61)
    ]
    found = squared_error(everything, *observer.range(), codes)
    assert found <= 1.1 * min(candidates)
    assert found <= squared_error(everything, lowest, highest, codes) * 1.001


def test_moving_average_weighs_each_batch_nine_tenths_of_the_next() -> None:
    observer = MovingAverage()
    for batch in stream("outlier"):
        observer.update(batch)
        observer.update(torch.empty(0))
    weights = 0.9 ** np.arange(3, -1, -1)
    lows, highs = ([float(pick(batch)) for batch in stream("outlier")] for pick in (torch.min, torch.max))
    assert observer.range() == pytest.approx((np.average(lows, weights=weights), np.average(highs, weights=weights)))


def test_divergence_of_the_papers_example() -> None:
    """Migacz 2017, page 38: eight bins to two levels."""
    counts = [1.0, 0, 2, 3, 5, 3, 1, 7]
    expanded = [2.0, 0, 2, 2, 4, 4, 4, 4]
    found = divergence(torch.tensor(counts, dtype=torch.float64), 0, 8, 2)
    assert found == pytest.approx(stats.entropy(counts, expanded))


@pytest.mark.parametrize("kind", ["normal", "rectified", "outlier", "negative"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entropy_is_close_to_brute_force(kind: str, bits: int) -> None:
    codes = activation_codes(bits, signed=False)
    observer = Entropy(codes)
    batches = [-batch for batch in stream("rectified")] if kind == "negative" else stream(kind)
    for batch in batches:
        observer.update(batch)
    everything = torch.cat(batches).double().numpy().ravel()
    everything = everything[everything != 0]
    sides = [side for side in (-1, 1) if (everything * side > 0).any()]
    low, high = observer.range()
    width = observer._histogram.bin_width

    def brute_force(threshold: int) -> float:
        clipped = everything.clip(-threshold * width, threshold * width)
        ends = (-threshold * (-1 in sides), threshold * (1 in sides))
        bins = {"bins": ends[1] - ends[0], "range": (ends[0] * width, ends[1] * width)}
        reference = np.histogram(clipped, **bins)[0]
        inside = np.histogram(everything[np.abs(everything) < threshold * width], **bins)[0]
        rounded = np.zeros(len(reference))
        edges = [-(-level * len(reference) // 2**bits) for level in range(2**bits + 1)]
        for first, after in itertools.pairwise(edges):
            taken = reference[first:after] > 0
            rounded[first:after][taken] = inside[first:after].sum() / max(taken.sum(), 1)
        return float(stats.entropy(reference, rounded))

    largest = round(np.abs(everything).max() / width + 0.5)
    candidates = range(largest, 2**bits // len(sides), -max(largest // 30, 1))
    found = round(max(-low, high) / width + 0.49)
    assert brute_force(found) <= 1.05 * min(brute_force(threshold) for threshold in candidates)
    assert (low < 0) == (-1 in sides)


def test_entropy_does_not_clip_all_that_was_seen_to_one_value() -> None:
    observer = Entropy(UNSIGNED)
    values = 0.1 + torch.rand(500, generator=torch.Generator().manual_seed(0))
    observer.update(values)
    assert observer.range()[1] > float(values.quantile(0.9))


def test_histogram_grows_without_losing_counts() -> None:
    histogram = Histogram(bins=16)
    values = [torch.zeros(3), torch.tensor([0.5, -0.25]), torch.tensor([7.9, -7.9, 0.1]), torch.empty(0)]
    for value in values:
        histogram.update(value)
    everything = torch.cat(values).numpy()
    assert histogram.limit == 8.0
    expected, _ = np.histogram(everything, bins=16, range=(-8, 8))
    assert histogram.counts.tolist() == expected.tolist()
    assert (histogram.minimum, histogram.maximum) == (np.float32(-7.9), np.float32(7.9))
    assert histogram.centers[0] == -7.5


@pytest.mark.parametrize("name", ["min_max", "moving_average", "percentile", "mse", "entropy"])
def test_bad_values_are_refused_and_nothing_seen_is_zero(name: str) -> None:
    observer = make_observer(name, codes=UNSIGNED, percentile=99.0)  # type: ignore[arg-type]
    assert observer.range() == (0.0, 0.0)
    observer.update(torch.zeros(5))
    assert observer.range() == (0.0, 0.0)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            observer.update(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("span", [(0.0, 3.0), (-1.0, 3.0), (-2.0, 0.0), (0.5, 2.0), (-5.0, -1.0), (0.0, 0.0)])
def test_zero_has_a_code_and_the_range_is_covered(signed: bool, bits: int, span: tuple[float, float]) -> None:
    codes = activation_codes(bits, signed=signed)
    scale, zero_point = affine_parameters(*span, codes)
    assert scale > 0
    assert codes.quant_min <= zero_point <= codes.quant_max
    low, high = (codes.quant_min - zero_point) * scale, (codes.quant_max - zero_point) * scale
    assert low <= min(span[0], 0) + scale / 2 + 1e-9
    assert high >= max(span[1], 0) - scale / 2 - 1e-9
    if span[0] >= 0:
        assert zero_point == codes.quant_min


def test_weight_codes() -> None:
    assert weight_codes(8, reduce_range=False) == CodeRange(-127, 127)
    assert weight_codes(8, reduce_range=True) == CodeRange(-64, 64)
    assert weight_codes(4, reduce_range=True) == CodeRange(-8, 7)
    assert weight_codes(2, reduce_range=False) == CodeRange(-2, 1)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4)])
def test_means_of_channels_of_any_rank(shape: tuple[int, ...]) -> None:
    axis = shape.index(3)
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    statistic = ChannelMean(axis)
    for batch in values:
        statistic.update(batch)
    others = [dimension for dimension in range(values.ndim) if dimension != axis + 1]
    torch.testing.assert_close(statistic.mean, values.double().mean(others))
