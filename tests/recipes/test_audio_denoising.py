"""The denoiser of speech: causal, the same frame by frame as at once, and its recipe runs."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from mil_cli.cli.main import main
from mil_cli.data.speech import speech
from mil_cli.errors import ExportError, ModelError
from mil_cli.export.onnx import export_onnx
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, build_module
from mil_cli.models.user_code import call_target
from mil_cli.task.denoising import Denoising

RECIPE = Path(__file__).parents[2] / "recipes" / "audio_denoising"
SMALL = {"bins": 33, "channels": 16, "hidden": 64, "blocks": 3}
STATE = [16, 14]
SAMPLES = {"train_samples": 64, "val_samples": 16, "test_samples": 16, "seconds": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three voices: harmonics of a gliding pitch, in syllables."""
    root = tmp_path_factory.mktemp("voices")
    generator = np.random.default_rng(0)
    times = np.arange(4000) / 8000
    for voice, pitch in enumerate((110.0, 170.0, 230.0)):
        for number in range(40):
            phase = 2 * np.pi * pitch * (times + generator.uniform(-0.3, 0.3) * times**2)
            harmonics = sum(np.sin(order * phase) / order for order in range(1, 9))
            syllables = np.sin(2 * np.pi * generator.uniform(2, 4) * times) ** 2
            path = root / f"voice{voice}" / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
                file.writeframes((6000 * harmonics * syllables).astype("<i2").tobytes())
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> nn.Module:
    """Return a small denoiser after some steps of training."""
    data = speech(root=folder, test_voice="voice2", **SAMPLES)  # type: ignore[arg-type]
    task = Denoising(window=64, state_shapes=[STATE])
    source = ModelSource.model_validate({"_target_": "model.build", **SMALL})
    module: nn.Module = build_module(source, root=RECIPE, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for epoch in range(3):
        for batch in data.train.batches(8, augment=True, epoch=epoch):
            args, _ = task.inputs(batch)
            optimizer.zero_grad()
            task.loss(module(*args), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def file(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that the recipe would export."""
    dynamic = {"magnitude": {0: "batch", 2: "frames"}, "state": {0: "batch"}}
    model = Model.capture(trained, (torch.rand(3, 33, 20), torch.zeros(3, *STATE)), dynamic=dynamic)
    assert not model.spec.notices
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    export_onnx(model, path)
    return path


def stream(name: str, **arguments: Any) -> Any:
    return call_target({"_target_": f"stream.{name}"}, root=RECIPE, where="stream", error=ModelError, extra=arguments)


def noise(samples: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(1).standard_normal(samples).astype(np.float32)


def test_no_frame_hears_a_later_one(trained: nn.Module) -> None:
    magnitude = torch.rand(2, 33, 12, generator=torch.Generator().manual_seed(0))
    changed = magnitude.clone()
    changed[:, :, 7:] *= 3
    with torch.no_grad():
        masks = [trained(each, torch.zeros(2, *STATE))[0] for each in (magnitude, changed)]
    assert torch.equal(masks[0][:, :, :7], masks[1][:, :, :7])
    assert not torch.allclose(masks[0][:, :, 7], masks[1][:, :, 7])


def test_every_frame_that_the_state_keeps_is_heard(trained: nn.Module) -> None:
    state = torch.zeros(1, *STATE, requires_grad=True)
    masks, _ = trained(torch.rand(1, 33, 1, generator=torch.Generator().manual_seed(0)), state)
    (gradient,) = torch.autograd.grad(masks.sum(), state)
    past = gradient.abs().sum((0, 1))
    # Of what a block keeps, one frame alone hears the oldest and the one a dilation ago: the taps of its convolution.
    assert past.nonzero().flatten().tolist() == [0, 1, 2, 4, 6, 10]


@pytest.mark.parametrize("samples", [32 * 40, 32 * 40 + 7, 20])
def test_a_stream_is_the_whole_recording(file: Path, samples: int) -> None:
    opened = stream("MaskFile", path=file)
    denoised, seconds = stream("frame_by_frame", file=opened, noisy=noise(samples))
    whole = stream("at_once", file=opened, noisy=noise(samples))
    assert denoised.shape == whole.shape == (samples,)
    assert float(np.abs(denoised - whole).max()) < 1e-5
    assert float(np.abs(whole).max()) > 1e-3
    assert len(seconds) == -(-samples // 32) + 1


def test_a_file_of_another_model_is_told(tmp_path: Path) -> None:
    export_onnx(Model.capture(nn.Linear(3, 2), (torch.rand(4, 3),)), tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="no file of this recipe"):
        stream("MaskFile", path=tmp_path / "other.onnx")


@pytest.mark.slow
def test_the_recipe_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        **{f"model.{key}": value for key, value in SMALL.items()},
        **{f"data.{key}": value for key, value in SAMPLES.items()},
        "data.root": folder,
        "data.test_voice": "voice2",
        "task.window": 64,
        "task.state_shapes": [STATE],
        "trainer.epochs": 2,
        "trainer.batch_size": 8,
        "stages.recover.trainer.epochs": 2,
        "stages.prune.macs": 0.5,
        "goals.macs.max_ratio": 0.5,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    out = tmp_path / "run"
    command = ["compress", str(RECIPE / "recipe.yaml"), *arguments, "~goals.quality", "~goals.latency", "~goals.size"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["final"]["quality"]["metric"] == "SI-SDR improvement"
    assert report["final"]["size_bytes"] < 0.5 * report["baseline"]["size_bytes"]
    sessions = [onnxruntime.InferenceSession(out / name) for name in ("baseline.onnx", "model.onnx")]
    shapes = [[(each.name, each.shape) for each in [*s.get_inputs(), *s.get_outputs()]] for s in sessions]
    assert shapes[0] == shapes[1]
    assert shapes[0] == [
        ("magnitude", ["batch", 33, "frames"]),
        ("state", ["batch", *STATE]),
        ("mask", ["batch", 33, "frames"]),
        ("next_state", ["batch", *STATE]),
    ]
    capsys.readouterr()
    cleaned = tmp_path / "cleaned.wav"
    words = [out / "model.onnx", folder / "voice2/0.wav", "--snr", 0, "--out", cleaned]
    stream("main", arguments=[str(word) for word in words])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("real-time factor: p50 ")
    # Of the quantized file: where sums end between two codes, rounding may take either.
    assert float(lines[1].rpartition(" ")[2]) < 0.01
    assert lines[2].startswith("SI-SDR: ")
    with wave.open(str(cleaned)) as written:
        assert written.getnframes() == 4000
