from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError
from mil_cli.measure.compare import Counts, compare
from mil_cli.measure.cost import cost_per_million
from mil_cli.measure.energy import can_measure_energy, counters, energy_source, measure_energy
from mil_cli.measure.memory import measure_memory
from mil_cli.measure.size import size_bytes, zipped_bytes
from mil_cli.measure.types import Latency, Measurement

WriteNet = Callable[..., Path]

LATENCY = Latency(p50=2.0, p90=2.5, p99=3.0, ratio_to_baseline=0.5, ratio_ci95=(0.45, 0.55), verdict="faster")


def test_a_measurement_is_written_as_the_report_holds_it() -> None:
    content = Measurement(params=3, macs=4, size_bytes=5, latency=LATENCY).to_json()
    assert json.loads(json.dumps(content)) == {
        "quality": None,
        "params": 3,
        "macs": 4,
        "size_bytes": 5,
        "zipped_bytes": None,
        "latency_ms": {"p50": 2.0, "p90": 2.5, "p99": 3.0, "ratio_to_baseline": 0.5, "ratio_ci95": [0.45, 0.55]},
        "throughput_per_s": 500.0,
        "peak_memory_bytes": None,
        "energy_j": None,
        "cost_per_million": None,
    }
    assert set(Measurement().to_json().values()) == {None}


def test_memory_grows_with_the_weights(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    small = write_conv_net(tmp_path / "small.onnx", channels=8, layers=1)
    large = write_conv_net(tmp_path / "large.onnx", channels=512)
    weights = size_bytes(large) - size_bytes(small)
    grown = measure_memory(large, device=device, feeds=image) - measure_memory(small, device=device, feeds=image)
    # The runtime holds them once at least; it repacks and copies some.
    assert weights * 0.9 < grown < weights * 6


def test_size_counts_external_weights(write_conv_net: WriteNet, tmp_path: Path) -> None:
    one = write_conv_net(tmp_path / "one.onnx")
    two = write_conv_net(tmp_path / "two.onnx", external=True)
    data = tmp_path / "two.onnx.data"
    assert size_bytes(one) == one.stat().st_size
    assert size_bytes(two) == two.stat().st_size + data.stat().st_size
    assert zipped_bytes(one) == len(zlib.compress(one.read_bytes(), 6))
    assert zipped_bytes(two) == sum(len(zlib.compress(file.read_bytes(), 6)) for file in (two, data))
    data.unlink()
    with pytest.raises(MeasureError, match=r"two\.onnx\.data is missing"):
        size_bytes(two)


def test_size_finds_weights_in_branches(tmp_path: Path) -> None:
    (tmp_path / "branch.bin").write_bytes(bytes(100))
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[25])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="branch.bin")
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])).SerializeToString())
    assert size_bytes(file) == file.stat().st_size + 100


def test_size_of_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.onnx"
    file.write_text("this is a text", encoding="utf-8")
    with pytest.raises(MeasureError, match="no ONNX file"):
        size_bytes(file)


def _rapl(folder: Path, name: str, joules: float, *, what: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(f"{what}\n", encoding="ascii")
    (folder / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n", encoding="ascii")
    (folder / name / "max_energy_range_uj").write_text("1000000000\n", encoding="ascii")


def test_energy_comes_from_a_counter_or_an_estimate_or_is_unknown(
    write_conv_net: WriteNet,
    tmp_path: Path,
    device: DeviceProfile,
    image: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = tmp_path / "nothing"
    file = write_conv_net(tmp_path / "model.onnx", channels=8, layers=1)
    assert measure_energy(file, device=device, feeds=image, latency=LATENCY, powercap=nothing) is None
    assert not can_measure_energy(device, powercap=nothing)

    with_watts = device.model_copy(update={"watts": 15.0})
    assert energy_source(with_watts, powercap=nothing) == "estimate"
    # 15 W for 2 ms.
    assert measure_energy(file, device=with_watts, feeds=image, latency=LATENCY, powercap=nothing) == pytest.approx(
        0.03
    )

    rapl = tmp_path / "powercap"
    _rapl(rapl, "intel-rapl:0", 5.0, what="package-0")
    _rapl(rapl, "intel-rapl:0:0", 3.0, what="core")
    _rapl(rapl, "intel-rapl:1", 7.0, what="package-1")
    _rapl(rapl, "intel-rapl:2", 15.0, what="psys")  # the whole machine: both processors and more
    assert [folder.name for folder in counters(rapl)] == ["intel-rapl:0", "intel-rapl:1"]
    assert energy_source(with_watts, powercap=rapl) == "counter"
    monkeypatch.setattr("mil_cli.measure.energy.SECONDS", 0.05)
    # These counters stand still.
    assert measure_energy(file, device=with_watts, feeds=image, latency=LATENCY, powercap=rapl) == 0.0


def test_cost_is_the_price_of_the_time(device: DeviceProfile) -> None:
    assert cost_per_million(LATENCY, device) is None
    # A million times 2 ms is 2000 s; at 3.6 an hour that is 2.
    assert cost_per_million(LATENCY, device.model_copy(update={"price_per_hour": 3.6})) == pytest.approx(2.0)


def test_models_are_compared_in_all_figures(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    files = [write_conv_net(tmp_path / f"{channels}.onnx", channels=channels) for channels in (48, 8)]
    priced = device.model_copy(update={"watts": 10.0, "price_per_hour": 1.0})
    large, small = compare(files, device=priced, feeds=image, counts=[Counts(10, 20), Counts()], sessions=1)
    assert (large.params, large.macs, small.params, small.macs) == (10, 20, None, None)
    assert [large.size_bytes, small.size_bytes] == [size_bytes(file) for file in files]
    assert small.latency is not None
    assert small.latency.verdict == "faster"
    for measured in (large, small):
        assert all(
            value is not None for name, value in measured.to_json().items() if name not in ("quality", "params", "macs")
        )
