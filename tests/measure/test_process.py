from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MeasureError
from mil_cli.measure import process
from mil_cli.measure.process import run_job
from mil_cli.measure.worker import turn_length

WriteNet = Callable[..., Path]

SETTINGS = {"rounds": 2, "sessions": 1}


def test_the_worker_imports_the_runtime_and_little_else() -> None:
    code = (
        "import sys, mil_cli.measure.worker as worker\n"
        "heavy = {'torch', 'scipy', 'pydantic', 'onnx', 'hydra', 'numpy', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import numpy, onnxruntime\n"
        "heavy = {'torch', 'scipy', 'pydantic', 'onnx', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_job_returns_both_clocks_of_every_inference(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    files = [write_conv_net(tmp_path / f"{name}.onnx", seed=name) for name in range(3)]
    result = run_job("latency", files, device=device, feeds=image, settings={"rounds": 4, "sessions": 2})
    assert len(result) == 2
    for models in result:
        turns = {len(turn) for model in models for turn in model}
        assert [len(model) for model in models] == [4, 4, 4]
        assert len(turns) == 1
        clocks = np.array(models)
        length = turns.pop()
        assert 3 <= length <= 15
        assert clocks.shape == (3, 4, length, 2)
        assert (clocks > 0).all()


@pytest.mark.parametrize(
    ("seconds", "length"), [(1e-5, 15), (1e-3, 5), (2e-3, 3), (0.05, 3), (0.11, 2), (0.2, 1), (3.0, 1)]
)
def test_a_turn_is_a_few_inferences_unless_they_are_long(seconds: float, length: int) -> None:
    assert turn_length([seconds]) == length


@pytest.mark.parametrize(
    ("fast", "slow", "length"), [(1e-3, 0.01, 5), (1e-4, 0.04, 7), (1e-4, 0.2, 1), (0.05, 0.11, 2), (1e-3, 3.0, 1)]
)
def test_the_slowest_model_bounds_what_the_fastest_asks_for(fast: float, slow: float, length: int) -> None:
    assert turn_length([fast, slow]) == turn_length([slow, fast]) == length
    assert length == 1 or length * slow <= 0.3


def test_a_users_modules_are_not_imported(
    write_conv_net: WriteNet,
    tmp_path: Path,
    device: DeviceProfile,
    image: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not the real one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_job("latency", [file], device=device, feeds=image, settings=SETTINGS)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", bytes(range(256)) * 8])
def test_a_damaged_file_is_named(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray], content: bytes
) -> None:
    good, bad = write_conv_net(tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    bad.write_bytes(content)
    with pytest.raises(MeasureError, match="onnxruntime failed") as caught:
        run_job("latency", [good, bad], device=device, feeds=image, settings=SETTINGS)
    assert caught.value.where == str(bad)


def test_inputs_that_do_not_fit_are_explained(write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    feeds = {"x": np.zeros((1, 3, 5), np.float32)}
    with pytest.raises(MeasureError, match="Invalid rank") as caught:
        run_job("latency", [file], device=device, feeds=feeds, settings=SETTINGS)
    assert caught.value.where == str(file)


def test_inputs_must_be_numbers(write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    with pytest.raises(MeasureError, match="must be numbers") as caught:
        run_job("latency", [file], device=device, feeds={"x": np.array([object()])}, settings=SETTINGS)
    assert caught.value.where == "x"


def test_a_missing_file_is_named(tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]) -> None:
    with pytest.raises(MeasureError, match="no such file"):
        run_job("memory", [tmp_path / "no.onnx"], device=device, feeds=image)


def test_input_names_may_hold_anything(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    file = write_conv_net(tmp_path / "model.onnx", input_name="in/put:0 file")
    assert run_job("latency", [file], device=device, feeds={"in/put:0 file": image["x"]}, settings=SETTINGS)


def _instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let the measuring process run `code`."""
    package = tmp_path / "other" / "mil_cli" / "measure"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "worker.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "other")}
    monkeypatch.setattr(process, "_environment", lambda: environment)


def test_a_killed_process_is_explained(
    write_conv_net: WriteNet,
    tmp_path: Path,
    device: DeviceProfile,
    image: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    _instead(monkeypatch, tmp_path, f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(MeasureError, match="killed by SIGKILL") as caught:
        run_job("memory", [file], device=device, feeds=image)
    assert "memory ran out" in str(caught.value.hint)


def test_the_last_words_are_passed_on(
    write_conv_net: WriteNet,
    tmp_path: Path,
    device: DeviceProfile,
    image: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    _instead(monkeypatch, tmp_path, "import sys; sys.exit('cannot find the runtime')")
    with pytest.raises(MeasureError, match=r"exit code 1.*cannot find the runtime"):
        run_job("memory", [file], device=device, feeds=image)


def test_no_process_outlives_an_interruption(
    write_conv_net: WriteNet, tmp_path: Path, device: DeviceProfile, image: dict[str, np.ndarray]
) -> None:
    file = write_conv_net(tmp_path / "model.onnx")
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def remember(*args: object, **kwargs: object) -> subprocess.Popen[str]:
        started.append(real(*args, **kwargs))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", remember)
        with pytest.raises(KeyboardInterrupt):
            run_job(
                "latency",
                [file],
                device=device,
                feeds=image,
                settings={"rounds": 100_000, "sessions": 1},
                on_advance=interrupt,
            )
    assert len(started) == 1
    assert started[0].poll() is not None
