"""Speech in noise: no clip is in two splits, mixtures have the noise that was asked for, and seeds decide."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mil_cli.cli import doctor
from mil_cli.cli.doctor import State
from mil_cli.data import speech as module
from mil_cli.data.base import Data
from mil_cli.data.speech import (
    DEBIAN_FOLDER,
    PACKAGES,
    NoisySpeech,
    coloured_noise,
    missing_packages,
    mix,
    read_voices,
    read_wav,
    speech,
    split_of,
)
from mil_cli.errors import DataError

VOICES = ("anna", "boris", "clara")
CLIPS = [f"part{number % 3}/clip{number}.wav" for number in range(80)]


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 8000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three voices of 80 clips, each of a constant of its own."""
    root = tmp_path_factory.mktemp("voices")
    for voice, name in enumerate(VOICES):
        for number, clip in enumerate(CLIPS):
            write_wav(root / name / clip, np.full(100, 1000 + 100 * number + voice))
    return root


def test_each_clip_is_in_one_split_and_only_test_has_its_voice(folder: Path) -> None:
    voices = read_voices(folder, test_voice="boris", sample_rate=8000)
    found = {
        split: {name: set((waveform * 32768).int().tolist()) for name, waveform in each.items()}
        for split, each in voices.items()
    }
    assert set(found["train"]) == set(found["val"]) == {"anna", "clara"}
    assert set(found["test"]) == set(VOICES)
    assert len(found["test"]["boris"]) == len(CLIPS)
    for name in ("anna", "clara"):
        parts = [found[split][name] for split in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(CLIPS)
    for split in ("train", "val", "test"):  # clips of a name go together
        assert {value - 2 for value in found[split]["clara"]} == found[split]["anna"]
    assert {split_of(clip) for clip in CLIPS} == {"train", "val", "test"}


def test_silent_clips_are_left_out(tmp_path: Path) -> None:
    for voice in VOICES[:2]:
        for clip in CLIPS:
            write_wav(tmp_path / voice / clip, np.full(10, 9000))
    write_wav(tmp_path / "anna/silence/1.wav", np.zeros(500))
    voices = read_voices(tmp_path, test_voice="anna", sample_rate=8000)
    assert len(voices["test"]["anna"]) == 10 * len(CLIPS)


def test_a_link_to_a_voice_is_no_other_voice(folder: Path) -> None:
    (folder / "another").symlink_to(folder / "boris", target_is_directory=True)
    (folder / "zoe").symlink_to(folder / "anna", target_is_directory=True)
    voices = read_voices(folder, test_voice="boris", sample_rate=8000)
    assert set(voices["train"]) == set(voices["val"]) == {"anna", "clara"}
    assert set(voices["test"]) == set(VOICES)


def test_a_voice_of_silence_cannot_be_tested_on(tmp_path: Path) -> None:
    write_wav(tmp_path / "anna" / "1.wav", np.zeros(8000))
    with pytest.raises(DataError, match="silent"):
        read_voices(tmp_path, test_voice="anna", sample_rate=8000)


def of(root: Path, **settings: object) -> Data:
    counts = {"train_samples": 24, "val_samples": 8, "test_samples": 8}
    given = {"root": root, "test_voice": "clara", "seconds": 0.04, **counts, **settings}
    return speech(**given)  # type: ignore[arg-type]


def first(data: Data, split: str, **settings: object) -> tuple[Tensor, Tensor]:
    noisy, clean = next(iter(getattr(data, split).batches(8, **settings)))
    return noisy, clean


def test_val_and_test_are_fixed_and_training_is_drawn_anew(folder: Path) -> None:
    one, two = of(folder), of(folder)
    for split in ("train", "val", "test"):
        assert getattr(one, split).fingerprint() == getattr(two, split).fingerprint()
        assert all(map(torch.equal, first(one, split), first(two, split)))
    drawn = [first(one, "train", augment=True, seed=seed, epoch=epoch)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    again = first(two, "train", augment=True, seed=0, epoch=1)[0]
    assert torch.equal(drawn[1], again)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (8, 320)
    assert drawn[0].dtype == torch.float32


@pytest.mark.parametrize("snr", [-12.0, 0.0, 7.5])
def test_the_ratio_of_a_mixture(snr: float) -> None:
    clean, noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    added = mix(clean, 5 * noise, snr=snr) - clean
    assert 10 * math.log10(float(clean.square().sum() / added.square().sum())) == pytest.approx(snr, abs=1e-3)


@pytest.mark.parametrize(("kind", "slope"), [("white", 0.0), ("pink", -1.0)])
def test_the_power_of_noise_over_frequency(kind: str, slope: float) -> None:
    torch.manual_seed(0)
    noise = torch.stack([coloured_noise(4096, kind) for _ in range(50)])
    power = torch.fft.rfft(noise).abs().square().mean(0).numpy()[1:-1]
    fitted = np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.03)
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=0.01)


def tones(frequencies: dict[str, int], length: int = 8000) -> dict[str, Tensor]:
    """Return a tone for each voice, of whole periods in 400 samples."""
    times = torch.arange(length) / 400
    return {name: (2 * math.pi * frequency * times).sin() for name, frequency in frequencies.items()}


def test_babble_is_of_other_voices_and_ratios_and_loudness_are_drawn() -> None:
    voices = tones({"a": 9, "b": 51, "c": 91})
    dataset = NoisySpeech(voices, ["a", "b"], 400, length=400, snr=(-5, 5), noises=["babble"])
    torch.manual_seed(0)
    targets, ratios, levels = [], [], []
    for index in range(400):
        noisy, clean = dataset[index]
        added = (torch.fft.rfft(noisy - clean).abs() > 0.05).nonzero().flatten().tolist()
        (target,) = (torch.fft.rfft(clean).abs() > 0.05).nonzero().flatten().tolist()
        assert target in (9, 51)
        assert set(added) <= {9, 51, 91} - {target}
        targets.append(target)
        ratios.append(10 * math.log10(float(clean.square().sum() / (noisy - clean).square().sum())))
        levels.append(float(noisy.square().mean().sqrt()))
    assert targets.count(9) == pytest.approx(200, abs=40)
    assert -5.01 < min(ratios) < -4.5
    assert 4.5 < max(ratios) < 5.01
    assert np.mean(ratios) == pytest.approx(0, abs=0.5)
    assert min(levels) == pytest.approx(0.05 / 3, rel=0.05)
    assert max(levels) == pytest.approx(0.05 * 3, rel=0.05)


class TestProblems:
    def test_missing_packages_come_with_the_apt_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path)
        for language in ("en", "es", "fr", "ru"):
            write_wav(tmp_path / f"{language}_XX_f_Someone/a.wav", np.full(10, 900))
        assert missing_packages() == ["asterisk-core-sounds-it-wav"]
        with pytest.raises(DataError, match=r"data\.root: .*asterisk-core-sounds-it-wav are missing") as caught:
            speech()
        assert "apt-get install asterisk-core-sounds-it-wav, or set data.root" in str(caught.value)
        finding = list(doctor.check_data())[2]
        assert finding.state is State.NOTE
        assert "apt-get install asterisk-core-sounds-it-wav" in finding.remedy

    def test_files_of_another_form(self, tmp_path: Path) -> None:
        write_wav(tmp_path / "wide.wav", np.zeros(20), channels=2)
        write_wav(tmp_path / "fast.wav", np.zeros(20), rate=16000)
        (tmp_path / "text.wav").write_text("no sound")
        for name, expected in (("wide", "2 channels"), ("fast", "16000 Hz"), ("text", "cannot be read")):
            with pytest.raises(DataError, match=rf"{expected}.*{name}\.wav"):
                read_wav(tmp_path / f"{name}.wav", sample_rate=8000)

    @pytest.mark.parametrize(
        ("settings", "where"),
        [
            ({"test_voice": "klara"}, r"data\.test_voice.*klara[\s\S]*did you mean 'clara'"),
            ({"seconds": 0.0}, r"data\.seconds"),
            ({"seconds": 30.0}, r"data\.seconds: a split has \d+ samples of the voice"),
            ({"snr": [3.0]}, r"data\.snr"),
            ({"snr": [3.0, -3.0]}, r"data\.snr"),
            ({"noises": ["pinc"]}, r"data\.noises.*pinc[\s\S]*did you mean 'pink'"),
            ({"noises": []}, r"data\.noises"),
            ({"val_samples": 0}, r"data\.val_samples"),
        ],
    )
    def test_settings_out_of_range(self, folder: Path, settings: dict[str, object], where: str) -> None:
        with pytest.raises(DataError, match=where):
            of(folder, **settings)

    def test_too_few_voices(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data\.test_voice"):
            of(tmp_path)
        for clip in CLIPS:
            write_wav(tmp_path / "clara" / clip, np.full(100, 900))
        with pytest.raises(DataError, match="no clips are left for train"):
            of(tmp_path)
        for clip in CLIPS:
            write_wav(tmp_path / "anna" / clip, np.full(100, 900))
        with pytest.raises(DataError, match="one voice only"):
            of(tmp_path)
        assert len(of(tmp_path, noises=["white"]).train) == 24


@pytest.mark.skipif(bool(missing_packages()), reason=f"speech is missing: apt-get install {' '.join(PACKAGES)}")
def test_debians_clips() -> None:
    voices = read_voices(DEBIAN_FOLDER, test_voice="ru_RU_f_IvrvoiceRU", sample_rate=8000)
    minutes = {split: sum(map(len, each.values())) / 8000 / 60 for split, each in voices.items()}
    assert len(voices["train"]) == len(voices["val"]) == 4
    assert minutes["train"] == pytest.approx(82, abs=6)
    assert minutes["val"] == pytest.approx(11, abs=4)
    assert len(voices["test"]["ru_RU_f_IvrvoiceRU"]) / 8000 / 60 == pytest.approx(23.8, abs=0.2)
