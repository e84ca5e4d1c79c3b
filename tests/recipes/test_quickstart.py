"""The quickstart as a user runs it: goals, report, cache, kills at random moments, two runs at the same time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mil_cli.cli.main import main
from mil_cli.graph.model import Model

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SHORT = (
    "model.width=16",
    "model.blocks=1",
    "trainer.epochs=2",
    "stages.nas.macs=0.6",
    "stages.nas.trainer.epochs=1",
    "stages.nas.evaluations=2",
    "stages.nas.population=2",
    "stages.nas.recalibrate_samples=128",
    "stages.quantize.trainer.epochs=1",
    "stages.recover.trainer.epochs=1",
    "trainer.checkpoint_every_seconds=0",
    "~goals.quality",
    "~goals.latency",
    "goals.macs.max_ratio=0.9",
    "goals.size.max_ratio=0.9",
    "stages.prune.macs=0.7",
    "measure.sessions=1",
)
"""The whole chain on a net that trains in seconds."""


def start(cache: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MIL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "mil_cli", "compress", str(QUICKSTART), *overrides, "--out", str(out)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def run(cache: Path, out: Path, *overrides: str) -> dict[str, Any]:
    process = start(cache, out, *overrides)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    return read(out)


def run_here(cache: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Run it in this process, which spares the start of another one."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MIL_CACHE", str(cache))
        assert main(["compress", str(QUICKSTART), *overrides, "--out", str(out)]) == 0
    return read(out)


def weights(out: Path) -> dict[str, bytes]:
    state = Model.load(out / "model.pt2").state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def assert_nothing_temporary(*folders: Path) -> None:
    for folder in folders:
        names = [path.name for path in folder.rglob("*")]
        assert [name for name in names if name.startswith(".writing-") or name.endswith((".tmp", ".lock"))] == []
    assert list((folders[0] / "work").iterdir()) == []


def test_the_chain_ends_in_a_file_that_replaces_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = run_here(tmp_path / "cache", out, *SHORT)
    assert report["version"] == 1
    assert report["goals_met"] is True
    assert [stage["name"] for stage in report["stages"]] == ["nas", "prune", "recover", "quantize"]
    assert report["final"]["quality"]["split"] == report["baseline"]["quality"]["split"] == "test"
    assert {stage["measurement"]["quality"]["split"] for stage in report["stages"]} == {"val"}
    timed = [stage["name"] for stage in report["stages"] if stage["measurement"]["latency_ms"] is not None]
    assert timed == ["recover", "quantize"]  # the file that is quantized is held against the one that it was made of
    for name, key in (("baseline.onnx", "baseline"), ("model.onnx", "final")):
        assert (out / name).stat().st_size == report[key]["size_bytes"]
    low, high = report["final"]["latency_ms"]["ratio_ci95"]
    assert low <= report["final"]["latency_ms"]["ratio_to_baseline"] <= high
    assert report["parity"]["metric_onnx"] == pytest.approx(report["parity"]["metric_torch"], abs=0.02)
    assert report["parity"]["agreement"] >= 0.99
    assert report["kernels"]["integer_layers"] == report["kernels"]["quantized_layers"] > 0

    baseline, final = (onnxruntime.InferenceSession(out / name) for name in ("baseline.onnx", "model.onnx"))
    for before, after in (
        (baseline.get_inputs(), final.get_inputs()),
        (baseline.get_outputs(), final.get_outputs()),
    ):
        assert [(v.name, v.type, v.shape) for v in before] == [(v.name, v.type, v.shape) for v in after]
    shape = [3 if isinstance(size, str) else size for size in baseline.get_inputs()[0].shape]
    feeds = {baseline.get_inputs()[0].name: np.zeros(shape, np.float32)}
    assert final.run(None, feeds)[0].shape == baseline.run(None, feeds)[0].shape

    again = run_here(tmp_path / "cache", tmp_path / "again", *SHORT)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["final"] == report["final"]
    assert weights(tmp_path / "again") == weights(out)
    assert_nothing_temporary(tmp_path / "cache", out, tmp_path / "again")


def kill_and_go_on(tmp_path: Path, moments: list[float], *overrides: str) -> Path:
    """Kill the same command after each number of seconds, then let it finish; return its folder."""
    cache, out = tmp_path / "killed-cache", tmp_path / "killed"
    for moment in moments:
        process = start(cache, out, *overrides)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(cache, out, *overrides)
    assert_nothing_temporary(cache, out)
    return out


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    started = time.monotonic()
    run(tmp_path / "cache", tmp_path / "whole", *SHORT)
    whole = time.monotonic() - started
    out = kill_and_go_on(tmp_path, [0.5 * whole, 0.4 * whole], *SHORT)
    assert weights(out) == weights(tmp_path / "whole")
    assert (out / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


@pytest.mark.slow
def test_two_runs_at_the_same_time_share_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    outs = [tmp_path / "one", tmp_path / "two"]
    for process in [start(cache, out, *SHORT) for out in outs]:
        _, messages = process.communicate()
        assert process.returncode == 0, messages
    reports = [json.loads((out / "report.json").read_text()) for out in outs]
    for first, second in zip(*(report["stages"] for report in reports), strict=True):
        assert sorted([first["cached"], second["cached"]]) == [False, True]
    assert weights(outs[0]) == weights(outs[1])
    assert_nothing_temporary(cache, *outs)


@pytest.mark.slow
def test_torchrun_shares_the_training_and_writes_one_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "MIL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mil_cli"]
    result = subprocess.run(
        [*launcher, "compress", str(QUICKSTART), *SHORT, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("goals met") == 1
    assert json.loads((out / "report.json").read_text())["goals_met"] is True


@pytest.mark.slow
def test_ten_kills_of_the_whole_quickstart(tmp_path: Path) -> None:
    report = run(tmp_path / "cache", tmp_path / "whole")
    assert report["goals_met"]
    moments = [random.Random(seed).uniform(2.0, 25.0) for seed in range(10)]
    out = kill_and_go_on(tmp_path, moments)
    assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.slow
def test_the_quickstart_again_takes_seconds(tmp_path: Path) -> None:
    run(tmp_path / "cache", tmp_path / "first")
    started = time.monotonic()
    report = run(tmp_path / "cache", tmp_path / "second")
    assert time.monotonic() - started < 10
    assert all(stage["cached"] for stage in report["stages"])
