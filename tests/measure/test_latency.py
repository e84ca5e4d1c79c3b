from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mil_cli.device.host import resolve
from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError
from mil_cli.events import SilentProgress
from mil_cli.measure.latency import measure_latency
from mil_cli.measure.statistics import NO_DIFFERENCE

WriteNet = Callable[..., Path]


class Recorder(SilentProgress):
    """Counts the steps that were reported."""

    def __init__(self) -> None:
        self.steps = 0
        self.total: int | None = None

    def work(self, description: str, total: int | None = None, *, done: int = 0):  # type: ignore[no-untyped-def,override]
        self.total = total
        recorder = self

        class Bar:
            def __enter__(self):  # type: ignore[no-untyped-def]
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def advance(self, steps: int = 1, *, note: str = "") -> None:
                recorder.steps += steps

        return Bar()


def test_a_copy_is_no_real_difference_and_more_work_is_slower(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    small = write_conv_net(tmp_path / "small.onnx", channels=32)
    copy = Path(shutil.copy(small, tmp_path / "copy.onnx"))
    large = write_conv_net(tmp_path / "large.onnx", channels=64)
    recorder = Recorder()
    first, second, third = measure_latency(
        [small, copy, large], device=device, feeds=image, rounds=60, sessions=3, progress=recorder
    )
    assert recorder.steps == recorder.total == 180
    assert (first.verdict, second.verdict, third.verdict) == ("baseline", NO_DIFFERENCE, "slower")
    assert (first.ratio_to_baseline, first.ratio_ci95) == (1.0, (1.0, 1.0))
    # 3.5 times the multiply-accumulates; the kernels differ in how well they use them.
    assert 2 < third.ratio_to_baseline < 6
    for latency in (first, second, third):
        assert 0 < latency.p50 <= latency.p90 <= latency.p99
        low, high = latency.ratio_ci95
        assert low <= latency.ratio_to_baseline <= high
        assert latency.throughput_per_s == pytest.approx(1000 / latency.p50)


def test_any_file_can_be_the_baseline(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    small = write_conv_net(tmp_path / "small.onnx", channels=16, layers=1)
    large = write_conv_net(tmp_path / "large.onnx", channels=64)
    first, second = measure_latency([small, large], device=device, feeds=image, baseline_index=1, sessions=1)
    assert first.verdict == "faster"
    assert second.verdict == "baseline"


def test_two_threads_are_measured_by_the_time_that_passes(
    write_conv_net: WriteNet, tmp_path: Path, image: dict[str, np.ndarray]
) -> None:
    device = resolve({"name": "host_cpu", "threads": 2})
    small = write_conv_net(tmp_path / "small.onnx", channels=16, layers=1)
    large = write_conv_net(tmp_path / "large.onnx", channels=96)
    assert measure_latency([small, large], device=device, feeds=image, sessions=1)[1].verdict == "slower"


@pytest.mark.slow
def test_a_copy_is_no_real_difference_nine_times_in_ten(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    file = write_conv_net(tmp_path / "model.onnx", channels=64, layers=5)
    copy = Path(shutil.copy(file, tmp_path / "copy.onnx"))
    verdicts = [measure_latency([file, copy], device=device, feeds=image)[1].verdict for _ in range(10)]
    assert verdicts.count(NO_DIFFERENCE) >= 9


@pytest.mark.parametrize(
    ("settings", "words"), [({"rounds": 59}, "too few rounds"), ({"sessions": 0}, "at least one session")]
)
def test_too_little_is_refused(
    write_conv_net: WriteNet,
    tmp_path: Path,
    device: DeviceProfile,
    image: dict[str, np.ndarray],
    settings: dict[str, int],
    words: str,
) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    with pytest.raises(MeasureError, match=words):
        measure_latency([file], device=device, feeds=image, **settings)


def test_nothing_is_refused(device: DeviceProfile, image: dict[str, np.ndarray]) -> None:
    with pytest.raises(MeasureError, match="nothing to measure"):
        measure_latency([], device=device, feeds=image)
