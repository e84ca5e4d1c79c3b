"""The recipe of spoken digits: what is heard, the recognizer, what is missing is told, and that it runs."""

from __future__ import annotations

import json
import stat
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mil_cli.cli.main import main
from mil_cli.data.base import Data
from mil_cli.data.source import build_data
from mil_cli.errors import DataError, MilError, ModelError
from mil_cli.models.source import ModelSource, build_module
from mil_cli.models.user_code import call_target, locate_in

RECIPE = Path(__file__).parents[2] / "recipes" / "speech_recognition"
SAMPLES = {"train_strings": 6, "train_samples": 24, "val_samples": 3, "test_samples": 3}
SYNTHESIZER = """#!{python} -IS
import math, struct, sys
if "--version" in sys.argv:
    print("a synthesizer of tones")
    raise SystemExit
digits = [int(digit) for digit in sys.argv[-1].split()]
waveform = [
    int(9000 * math.sin(2 * math.pi * (400 + 250 * digit) * time / 22050)) for digit in digits for time in range(6000)
]
content = struct.pack(f"<{{len(waveform)}}h", *waveform)
form = b"fmt ", 16, 1, 1, 22050, 44100, 2, 16, b"data", 0x7FFFF000
header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0x7FFFF024, b"WAVE", *form)
sys.stdout.buffer.write(header + content)
"""
"""Speaks a tone for each digit, in a file whose header does not know its length, as espeak-ng does to stdout."""


def call(target: str, **arguments: Any) -> Any:
    return call_target({"_target_": target}, root=RECIPE, where="recipe", error=MilError, extra=arguments)


def install(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "espeak-ng"
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a synthesizer in `bin`, recordings of two voices in `recorded`, and a cache of its own."""
    install(tmp_path / "bin", SYNTHESIZER.format(python=sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("MIL_CACHE", str(tmp_path / "cache"))
    times = np.arange(2800) / 8000
    for voice, shift in {"high": 60, "low": -60}.items():
        for digit in range(10):
            path = tmp_path / "recorded" / voice / "digits" / f"{digit}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
                tone = 8000 * np.sin(2 * np.pi * (400 + 250 * digit + shift) * times)
                file.writeframes(np.pad(tone, 400).astype("<i2").tobytes())
    return tmp_path


def data(machine: Path, **settings: Any) -> Data:
    config = {"_target_": "data.build", "root": str(machine / "recorded"), **SAMPLES, **settings}
    return build_data(config, RECIPE)


def recognizer(**settings: Any) -> nn.Module:
    made = build_module(ModelSource.model_validate({"_target_": "model.build", **settings}), root=RECIPE, seed=0)
    assert isinstance(made, nn.Module)
    return made.eval()


def test_val_and_test_are_fixed_and_training_is_drawn_anew(machine: Path) -> None:
    first, second = data(machine), data(machine)
    for name in ("train", "val", "test"):
        assert getattr(first, name).fingerprint() == getattr(second, name).fingerprint()
    features, targets = next(iter(first.train.batches(24, augment=True, epoch=1)))  # type: ignore[misc]
    assert features.shape == (24, 321, 40)
    assert not torch.equal(features, next(iter(first.train.batches(24, augment=True, epoch=2)))[0])  # type: ignore[index]
    lengths = (targets != -100).sum(1)
    said = targets[targets != -100]
    assert (int(lengths.min()), int(lengths.max())) == (3, 5)
    assert (int(said.min()), int(said.max())) == (1, 10)  # 0 is the blank


def test_what_was_said_once_is_kept_and_what_is_damaged_is_said_again(machine: Path) -> None:
    before = data(machine).test.fingerprint()
    talker = (machine / "bin" / "espeak-ng").read_text()
    version_only = talker.replace("digits = [", "raise SystemExit('silent')\ndigits = [")
    install(machine / "bin", version_only)
    assert data(machine).test.fingerprint() == before
    (kept,) = (machine / "cache" / "digits").glob("test-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(DataError, match="silent"):
        data(machine)
    install(machine / "bin", talker)
    assert data(machine).test.fingerprint() == before


def test_no_voice_is_in_two_splits() -> None:
    speakers = locate_in("voices.SPEAKERS", root=RECIPE, where="data", error=DataError)
    names = [name for voices in speakers.values() for name in voices.split()]
    assert len(names) == len(set(names))
    assert set(speakers) == {"train", "val", "test"}


@pytest.mark.parametrize("hertz", [300, 1000, 3000])
def test_a_tone_is_loudest_in_the_band_around_it_however_loud_it_is(hertz: int) -> None:
    tone = torch.sin(2 * torch.pi * hertz * torch.arange(8000) / 8000)
    found = call("data.log_mel", waveform=tone, bins=24)
    assert found.shape == (101, 24)
    mel = [2595 * np.log10(1 + each / 700) for each in (60, 3900, hertz)]
    nearest = round((mel[2] - mel[0]) / (mel[1] - mel[0]) * 25) - 1  # of 24 centres, evenly spaced in mel
    assert abs(int(found[10:-10].mean(0).argmax()) - nearest) <= 1
    torch.testing.assert_close(call("data.log_mel", waveform=8 * tone, bins=24).mean(), found.mean(), rtol=0, atol=1e-5)


def test_bands_share_every_frequency_between_them() -> None:
    bands = call("data.mel_bands", bins=16)
    middle = bands.sum(0)[10:100]  # from the first centre to the last
    torch.testing.assert_close(middle, torch.ones_like(middle), rtol=0, atol=1e-4)


def test_a_block_is_the_transformers() -> None:
    block = call("model.Block", width=12, heads=3, hidden=20, dropout=0.0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs: dict[str, Tensor] = {}
    names = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "project.",
        "linear1.": "feed.0.",
        "linear2.": "feed.2.",
    }
    names |= {"norm1.": "attention_norm.", "norm2.": "feed_norm."}
    for their, our in names.items():
        for kind in ("weight", "bias"):
            theirs[f"{their}{kind}"] = block.state_dict()[f"{our}{kind}"]
    layer.load_state_dict(theirs)
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [5, 8, 321])
def test_scores_come_for_every_fourth_frame(frames: int) -> None:
    net = recognizer(width=16, channels=4, blocks=1)
    assert net(torch.randn(2, frames, 40)).shape == (2, -(-frames // 4), 11)


def test_what_is_missing_or_impossible_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.seconds"):
        data(machine, seconds=1.0)
    with pytest.raises(DataError, match=r"data\.val_samples"):
        data(machine, val_samples=0)
    with pytest.raises(DataError, match=r"data\.languages"):
        data(machine, languages=["en", "de"])
    with pytest.raises(DataError, match="no recorded digits"):
        data(machine, root=str(machine / "bin"))
    with pytest.raises(ModelError, match="5 heads"):
        recognizer(heads=5)
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(DataError, match="apt-get install espeak-ng"):
        data(machine)


@pytest.mark.parametrize(("seconds", "loudness", "message"), [(0.3, 0, "silent"), (3.1, 8000, "does not fit")])
def test_recordings_that_cannot_be_used_are_told(machine: Path, seconds: float, loudness: int, message: str) -> None:
    spoilt = machine / "recorded" / "low" / "digits" / "3.wav"
    with wave.open(str(spoilt), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        file.writeframes(np.full(round(8000 * seconds), loudness, "<i2").tobytes())
    with pytest.raises(DataError, match=message):
        data(machine)


@pytest.mark.slow
def test_the_recipe_runs(machine: Path) -> None:
    settings = {
        **{f"data.{key}": value for key, value in SAMPLES.items()},
        "data.root": machine / "recorded",
        "model.width": 32,
        "model.channels": 8,
        "model.blocks": 1,
        "trainer.epochs": 1,
        "stages.rounded.calibration_samples": 8,
    }
    out = machine / "run"
    arguments = [f"{key}={value}" for key, value in settings.items()]
    command = ["compress", str(RECIPE / "recipe.yaml"), *arguments, "~goals"]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["final"]["quality"]["metric"] == "token error rate"
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("features", ["batch", "frames", 40])]
    (scores,) = session.run(None, {"features": np.zeros((2, 50, 40), np.float32)})
    assert scores.shape == (2, 13, 11)
