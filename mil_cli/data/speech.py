"""Speech in noise: clips of several voices, of five Debian packages or of a folder, mixed anew at each reading."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mil_cli.data.base import Data
from mil_cli.data.datasets import DatasetSplit
from mil_cli.errors import DataError, did_you_mean

DEBIAN_FOLDER = Path("/usr/share/asterisk/sounds")
LANGUAGES = ("en", "es", "fr", "it", "ru")
PACKAGES = tuple(f"asterisk-core-sounds-{language}-wav" for language in LANGUAGES)
NOISES = ("white", "pink", "babble")

_TALKERS = 4  # in a babble
_LOUDNESS = 0.05  # root mean square of mixtures; it varies by a factor of 3 either way
_SILENT = 1e-3  # clips with a smaller root mean square hold no speech
_SHARES = {"test": 10, "val": 20}  # of a hundred names of clips: test has those below 10, val the next ten


def speech(
    *,
    root: str | Path | None = None,
    test_voice: str = "ru_RU_f_IvrvoiceRU",
    sample_rate: int = 8000,
    seconds: float = 2.0,
    snr: Sequence[float] = (-5.0, 5.0),
    noises: Sequence[str] = NOISES,
    train_samples: int = 2000,
    val_samples: int = 300,
    test_samples: int = 1000,
) -> Data:
    """Load clips of speech and mix excerpts of them with noise.

    Test has the speech of a voice that neither train nor val know. A clip of another voice is in one split only, and
    those of the same name (the same sentence of several languages) are in the same one. The noise is white, pink (1/f),
    or the babble of four other voices' excerpts of the same split.

    Args:
        root: A folder with a folder of WAV files (one channel, 16 bits) for each voice; by default where Debian's
            packages put them.
        test_voice: The folder of the voice that only test has.
        sample_rate: Which the files must have, in Hz: nothing is resampled.
        seconds: Length of the excerpts.
        snr: Smallest and largest ratio of speech to noise, in dB; drawn evenly between them.
        noises: Which kinds of noise there are; drawn evenly.
        train_samples: Excerpts of an epoch; each epoch has new ones.
        val_samples: Excerpts of val, always the same.
        test_samples: Excerpts of test, always the same.

    Returns:
        Splits with batches ``(noisy, clean)``: float32 waveforms of shape (batch, samples).

    Raises:
        DataError: Files are missing or are no such WAV files, or a setting is out of range.
    """
    length = round(seconds * sample_rate)
    if length < 1:
        raise DataError("an excerpt needs at least one sample", where="data.seconds", value=seconds)
    if len(snr) != 2 or not snr[0] <= snr[1]:
        raise DataError("give the smallest and the largest ratio, in dB", where="data.snr", value=list(snr))
    for noise in noises or [""]:
        if noise not in NOISES:
            raise DataError("unknown noise", where="data.noises", value=noise, hint=did_you_mean(noise, NOISES))
    folder = DEBIAN_FOLDER if root is None else Path(root)
    if root is None and (missing := missing_packages()):
        raise DataError(
            f"the clips of the Debian package {missing[0]} are missing",
            where="data.root",
            value=str(folder),
            hint=f"apt-get install {' '.join(missing)}, or set data.root to a folder with a folder of WAV files for "
            "each voice",
        )
    voices = read_voices(folder, test_voice=test_voice, sample_rate=sample_rate)

    def split(name: str, samples: int) -> DatasetSplit:
        if samples < 1:
            raise DataError("must be at least 1", where=f"data.{name}_samples", value=samples)
        targets = [test_voice] if name == "test" else [voice for voice in voices[name] if voice != test_voice]
        dataset = NoisySpeech(voices[name], targets, samples, length=length, snr=(snr[0], snr[1]), noises=noises)
        return DatasetSplit(dataset, where=f"data.{name}")

    return Data(
        name="speech",
        train=split("train", train_samples),
        val=split("val", val_samples),
        test=split("test", test_samples),
    )


class NoisySpeech(Dataset[tuple[Tensor, Tensor]]):
    """Excerpts in noise, drawn anew at each reading by torch's global generator.

    Args:
        voices: The speech of each voice, of shape (samples,).
        targets: The voices that are listened to; the others only babble.
        samples: Length of the data set.
        length: Of an excerpt, in samples.
        snr: Smallest and largest ratio of speech to noise, in dB.
        noises: Kinds of noise.

    Raises:
        DataError: A voice has less speech than an excerpt needs, or there is no other voice that could babble.
    """

    def __init__(
        self,
        voices: Mapping[str, Tensor],
        targets: Sequence[str],
        samples: int,
        *,
        length: int,
        snr: tuple[float, float],
        noises: Sequence[str],
    ) -> None:
        self._voices = dict(voices)
        self._targets = list(targets)
        self._samples = samples
        self._length = length
        self._snr = snr
        self._noises = tuple(noises)
        for name, waveform in self._voices.items():
            if len(waveform) < length:
                raise DataError(
                    f"a split has {len(waveform)} samples of the voice {name}, and an excerpt takes {length}",
                    where="data.seconds",
                    hint="take shorter excerpts, or give the voice more clips",
                )
        if "babble" in noises and any(not self._others(target) for target in targets):
            raise DataError(
                "babble takes the voices of others, and there is one voice only",
                where="data.noises",
                value=list(noises),
                hint="leave babble out, or give more voices",
            )

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a mixture and the speech in it, float32 of shape (length,)."""
        target = self._targets[_below(len(self._targets))]
        clean = self._excerpt(target)
        kind = self._noises[_below(len(self._noises))]
        noise = self._babble(target) if kind == "babble" else coloured_noise(self._length, kind)
        chosen, loudness = torch.rand(2).tolist()
        noisy = mix(clean, noise, snr=self._snr[0] + chosen * (self._snr[1] - self._snr[0]))
        gain = _LOUDNESS * 3 ** (2 * loudness - 1) / _level(noisy)
        return gain * noisy, gain * clean

    def _others(self, target: str) -> list[str]:
        return [voice for voice in self._voices if voice != target]

    def _excerpt(self, voice: str) -> Tensor:
        waveform = self._voices[voice]
        start = _below(len(waveform) - self._length + 1)
        return waveform[start : start + self._length]

    def _babble(self, target: str) -> Tensor:
        others = self._others(target)
        talkers = [self._excerpt(others[_below(len(others))]) for _ in range(_TALKERS)]
        return torch.stack([talker / _level(talker) for talker in talkers]).sum(0)


def coloured_noise(length: int, kind: str) -> Tensor:
    """Return normal noise by torch's global generator, of mean power 1.

    Args:
        length: In samples.
        kind: ``white``, or ``pink``: with a power that falls as 1/f.

    Returns:
        Shape (length,).
    """
    white = torch.randn(length)
    if kind == "white":
        return white
    amplitude = torch.arange(length // 2 + 1).clamp(min=1).rsqrt()
    noise: Tensor = torch.fft.irfft(torch.fft.rfft(white) * amplitude, n=length)
    return noise / _level(noise)


def mix(clean: Tensor, noise: Tensor, *, snr: float) -> Tensor:
    """Add noise to speech.

    Args:
        clean: Speech, of shape (samples,).
        noise: Noise of the same shape; it is scaled.
        snr: Power of the speech over that of the noise, in dB.
    """
    return clean + noise * (_level(clean) / _level(noise) * 10 ** (-snr / 20))


def missing_packages(languages: Collection[str] = LANGUAGES) -> list[str]:
    """Return the Debian packages of some languages whose clips are not here."""
    return [
        package
        for package, language in zip(PACKAGES, LANGUAGES, strict=True)
        if language in languages and next(DEBIAN_FOLDER.glob(f"{language}_*/*.wav"), None) is None
    ]


def read_voices(folder: Path, *, test_voice: str, sample_rate: int) -> dict[str, dict[str, Tensor]]:
    """Read the clips of all voices, and lay those of each split end to end.

    Args:
        folder: Has a folder for each voice; WAV files may lie deeper in it.
        test_voice: The voice whose clips are all in test.
        sample_rate: Which the files must have, in Hz.

    Returns:
        Split -> voice -> waveform in [-1, 1] of shape (samples,), in a fixed order. Silent clips are left out, and
        voices without a clip in a split.

    Raises:
        DataError: There is no such voice, a voice besides it is missing, or a file cannot be read.
    """
    names = _voice_names(folder)
    if test_voice not in names:
        raise DataError(
            "there is no such voice with WAV files",
            where="data.test_voice",
            value=test_voice,
            hint=did_you_mean(test_voice, names)
            if names
            else f"lay a folder of WAV files for each voice into {folder}",
        )
    clips: dict[str, dict[str, list[Tensor]]] = {"train": {}, "val": {}, "test": {}}
    for voice in names:
        for path in sorted((folder / voice).rglob("*.wav")):
            waveform = read_wav(path, sample_rate=sample_rate)
            if len(waveform) and float(_level(waveform)) > _SILENT:
                clip = path.relative_to(folder / voice).as_posix()
                split = "test" if voice == test_voice else split_of(clip)
                clips[split].setdefault(voice, []).append(waveform)
    if test_voice not in clips["test"]:
        raise DataError(
            "every clip of the voice is silent", where="data.test_voice", value=test_voice, hint="name another voice"
        )
    for split in ("train", "val"):
        if not clips[split]:
            raise DataError(
                f"no clips are left for {split}",
                where="data.root",
                value=str(folder),
                hint="give voices besides data.test_voice, with some dozens of clips each",
            )
    return {
        split: {voice: torch.cat(waveforms) for voice, waveforms in voices.items()} for split, voices in clips.items()
    }


def _voice_names(folder: Path) -> list[str]:
    """Return the folders that hold WAV files, without links to others: the voice to test on must have one name."""
    names = sorted({path.relative_to(folder).parts[0] for path in folder.glob("*/**/*.wav")})
    places: dict[Path, str] = {}
    for name in sorted(names, key=lambda name: ((folder / name).is_symlink(), name)):
        places.setdefault((folder / name).resolve(), name)
    return sorted(places.values())


def split_of(clip: str) -> str:
    """Return the split that has a clip, by its path below the voice's folder: 80 % train, 10 % val, 10 % test."""
    place = int.from_bytes(hashlib.sha256(clip.encode()).digest()[:8]) % 100
    return next((split for split, below in _SHARES.items() if place < below), "train")


def read_wav(path: Path, *, sample_rate: int) -> Tensor:
    """Read a WAV file of one channel and 16 bits.

    Args:
        path: The file.
        sample_rate: Which it must have, in Hz.

    Returns:
        float32 in [-1, 1] of shape (samples,).

    Raises:
        DataError: It cannot be read, or is of another form.
    """
    where = {"where": "data.root", "value": str(path)}
    try:
        with wave.open(str(path)) as file:
            form = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as problem:
        raise DataError(f"the file cannot be read: {problem}", **where, hint="replace or remove it") from problem
    if form != (1, 16, sample_rate):
        raise DataError(
            f"the file has {form[0]} channels, {form[1]} bits and {form[2]} Hz",
            **where,
            hint=f"convert it to one channel, 16 bits and {sample_rate} Hz, or set data.sample_rate",
        )
    return torch.from_numpy(np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768)


def _level(waveform: Tensor) -> Tensor:
    """Return the root mean square, never 0."""
    return waveform.square().mean().sqrt().clamp(min=1e-9)


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))
