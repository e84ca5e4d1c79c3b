"""Strings of digits in five languages: real recordings of five voices, and a synthesizer's many voices.

Train knows the recordings and some of the synthesizer's voices; val and test have other voices of it, each its own.
What the synthesizer speaks is made once, and kept in `digits/` of mil's cache folder.
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import subprocess
import wave
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy.signal import resample_poly
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from mil_cli.data.speech import DEBIAN_FOLDER, coloured_noise, missing_packages, mix, read_wav
from mil_cli.errors import DataError
from mil_cli.files import writing
from mil_cli.run.cache import default_location

RATE = 8000  # Hz, of the recordings
DIGITS = 10
PAD = -100  # behind the end of a target
FRAME, HOP = 200, 80  # samples: 25 ms every 10 ms

RECORDED = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")
ACCENTS = (
    *("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc"),
    *("es", "es-419", "fr-fr", "fr-be", "fr-ch", "it", "it", "ru", "ru-lv"),
)
SPEAKERS = {
    "train": "adam Alex Alicia Andrea Andy antonio belinda benjamin boris caleb david Denis Diogo ed edward edward2 f1 "
    "f2 f3 Gene Gene2 grandma grandpa gustave Henrique Hugo iven iven2 Jacky john klatt2 klatt4 Lee linda m1 m2 m3 m4 "
    "m7 marcelo Marco Mario michel miguel Mike Nguyen pablo pedro quincy rob robert sandro steph steph2",
    "val": "f5 m5 norbert shelby victor",
    "test": "Annie anika aunty f4 m6 m8 max Michael paul steph3 travis zac",
}
"""The synthesizer's voices of each split, without those that whisper, croak or play robots."""

_SHORTEST, _LONGEST = 3, 5  # digits of a string
_RECORDED_SHARE = 0.3  # of what train reads
_NOISE_DB = 10.0, 30.0  # ratio of speech to noise


@dataclass(frozen=True)
class Spoken:
    """A recording.

    Attributes:
        waveform: int16 of shape (samples,), at 8 kHz, without silence around.
        digits: What is said.
    """

    waveform: Tensor
    digits: tuple[int, ...]


class ConnectedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Strings of digits in light noise, somewhere within a window; drawn by torch's global generator.

    Args:
        strings: Whole strings, spoken by the synthesizer.
        recorded: For each recorded voice its ten digits; strings are joined of them. Empty for val and test.
        samples: Length of the data set; None: that of `strings`, each read once and as it is.
        window: Length of what is heard, in samples.
        bins: Mel bands.
    """

    def __init__(
        self,
        strings: Sequence[Spoken],
        recorded: Sequence[Sequence[Tensor]],
        samples: int | None,
        *,
        window: int,
        bins: int,
    ) -> None:
        self._strings = strings
        self._recorded = recorded
        self._samples = samples
        self._window = window
        self._bins = bins

    def __len__(self) -> int:
        return len(self._strings) if self._samples is None else self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return features of shape (frames, bins), and the digits + 1 as int64, padded: the blank of CTC is 0."""
        if self._samples is None:
            speech, digits = _float(self._strings[index].waveform), self._strings[index].digits
        else:
            speech, digits = self._joined() if torch.rand(()) < _RECORDED_SHARE else self._drawn()
        heard = torch.zeros(self._window)
        start = _below(self._window - len(speech) + 1)
        heard[start : start + len(speech)] = speech
        low, high = _NOISE_DB
        noisy = mix(heard, coloured_noise(self._window, "pink"), snr=low + (high - low) * float(torch.rand(())))
        return log_mel(noisy, self._bins), _padded([digit + 1 for digit in digits])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the recordings, and of what is made of them."""
        said = [string.digits for string in self._strings]
        digest = hashlib.sha256(repr((said, self._samples, self._window, self._bins, _source())).encode())
        waveforms = [string.waveform for string in self._strings] + [each for voice in self._recorded for each in voice]
        for waveform in waveforms:
            digest.update(waveform.numpy().tobytes())
        return digest.hexdigest()

    def _drawn(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return a string that the synthesizer spoke, a little faster or slower, and what is said."""
        string = self._strings[_below(len(self._strings))]
        longest = self._window / len(string.waveform)
        return _stretched(_float(string.waveform), min(longest, 0.85 + 0.3 * float(torch.rand(())))), string.digits

    def _joined(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return recorded digits with pauses between them, as many as the window holds, and what is said."""
        voice = self._recorded[_below(len(self._recorded))]
        factor = 0.75 + 0.4 * float(torch.rand(()))
        parts: list[Tensor] = []
        digits: list[int] = []
        length = 0
        for _ in range(_SHORTEST + _below(_LONGEST - _SHORTEST + 1)):
            digit = _below(DIGITS)
            part = functional.pad(_stretched(_float(voice[digit]), factor), (0, _below(RATE // 8)))
            length += len(part)
            if length > self._window:
                break
            parts.append(part)
            digits.append(digit)
        return torch.cat(parts), tuple(digits)


def log_mel(waveform: Tensor, bins: int) -> Tensor:
    """Return the logarithms of the energies in mel bands, brought to mean 0 and deviation 1 over the whole recording.

    Args:
        waveform: At 8 kHz, of shape (samples,).
        bins: Number of bands.

    Returns:
        Shape (samples // 80 + 1, bins).
    """
    spectrum = torch.stft(
        waveform, 256, HOP, FRAME, torch.hann_window(FRAME), center=True, pad_mode="constant", return_complex=True
    )
    energies = (mel_bands(bins) @ spectrum.abs().square()).T
    logarithms = (energies + 1e-6).log()
    return (logarithms - logarithms.mean()) / logarithms.std()


@cache
def mel_bands(bins: int) -> Tensor:
    """Return triangles that overlap by half, evenly spaced in mel from 60 Hz to 3,900 Hz; shape (bins, 129)."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (60, 3900))
    edges = torch.linspace(low, high, bins + 2)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, 129)
    rising = (frequencies - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    falling = (hertz[2:, None] - frequencies) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def recorded_digits(root: Path | None = None) -> list[list[Tensor]]:
    """Return the ten digits of each recorded voice, int16 of shape (samples,).

    Args:
        root: A folder with `digits/0.wav` to `digits/9.wav` in a folder for each voice; None: where Debian's packages
            put the recordings of five voices.

    Raises:
        DataError: The recordings are missing or cannot be read.
    """
    folder, voices = DEBIAN_FOLDER, RECORDED
    if root is not None:
        folder, voices = root, tuple(sorted(path.parents[1].name for path in root.glob("*/digits/0.wav")))
    if root is None and (missing := missing_packages()):
        raise DataError(
            f"the recordings of the Debian package {missing[0]} are missing",
            where="data.root",
            value=str(folder),
            hint=f"apt-get install {' '.join(missing)}, or set data.root to a folder with VOICE/digits/0.wav to 9.wav",
        )
    if not voices:
        raise DataError(
            "there are no recorded digits",
            where="data.root",
            value=str(folder),
            hint="give a folder with digits/0.wav to digits/9.wav in a folder for each voice",
        )
    files = [[folder / voice / "digits" / f"{digit}.wav" for digit in range(DIGITS)] for voice in voices]
    return [[_trimmed(read_wav(file, sample_rate=RATE).numpy()) for file in voice] for voice in files]


def synthesized(split: str, count: int, *, window: int) -> list[Spoken]:
    """Return strings of 3 to 5 digits that fit into a window, spoken by the voices of a split.

    Raises:
        DataError: The synthesizer is missing or fails.
    """
    if shutil.which("espeak-ng") is None:
        raise DataError("the synthesizer espeak-ng is missing", where="data", hint="apt-get install espeak-ng")
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, check=True).stdout
    facts = repr((split, count, window, version, _source()))
    file = default_location() / "digits" / f"{split}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
    try:
        return _unpacked(safetensors.torch.load_file(file))
    except (FileNotFoundError, safetensors.SafetensorError, KeyError):
        pass  # not made yet, or damaged
    with ThreadPoolExecutor() as pool:
        strings = list(pool.map(lambda number: _fitting(split, number, window), range(count)))
    with writing(file) as temporary:
        safetensors.torch.save_file(_packed(strings), temporary)
    return strings


def _packed(strings: Sequence[Spoken]) -> dict[str, Tensor]:
    return {
        "waveforms": torch.cat([string.waveform for string in strings]),
        "lengths": torch.tensor([len(string.waveform) for string in strings]),
        "digits": torch.stack([_padded(string.digits) for string in strings]),
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> list[Spoken]:
    waveforms = tensors["waveforms"].split(tensors["lengths"].tolist())
    digits = [tuple(digit for digit in row if digit != PAD) for row in tensors["digits"].tolist()]
    return [Spoken(*each) for each in zip(waveforms, digits, strict=True)]


def _padded(digits: Sequence[int]) -> Tensor:
    return functional.pad(torch.tensor(digits), (0, _LONGEST - len(digits)), value=PAD)


def build(
    root: str | Path | None = None,
    train_strings: int = 4000,
    train_samples: int = 3000,
    val_samples: int = 300,
    test_samples: int = 1000,
    seconds: float = 3.2,
    bins: int = 40,
) -> dict[str, Dataset]:
    """Return the three splits.

    Args:
        root: A folder with recorded digits, see `recorded_digits`; by default those of the Debian packages.
        train_strings: Strings that the synthesizer speaks for train.
        train_samples: Samples of an epoch; each epoch has new ones.
        val_samples: Strings of val, always the same.
        test_samples: Strings of test, always the same; of four digits each on average.
        seconds: Length of the window in which a string is heard.
        bins: Mel bands; also `model.bins`.

    Raises:
        DataError: What is missing, or a number that is out of range.
    """
    counts = {"train_strings": train_strings, "train_samples": train_samples}
    counts |= {"val_samples": val_samples, "test_samples": test_samples, "bins": bins}
    for name, count in counts.items():
        if count < 1:
            raise DataError("must be at least 1", where=f"data.{name}", value=count)
    if seconds < _SHORTEST:
        raise DataError("a slow digit takes a second", where="data.seconds", value=seconds, hint="give 3 or more")
    window = round(seconds * RATE)
    recorded = recorded_digits(None if root is None else Path(root))

    def split(name: str, strings: int, samples: int | None) -> ConnectedDigits:
        spoken = synthesized(name, strings, window=window)
        return ConnectedDigits(spoken, recorded if samples else (), samples, window=window, bins=bins)

    return {
        "train": split("train", train_strings, train_samples),
        "val": split("val", val_samples, None),
        "test": split("test", test_samples, None),
    }


def _fitting(split: str, number: int, window: int) -> Spoken:
    generator = random.Random(f"{split} {number}")
    while True:
        digits = tuple(generator.randrange(DIGITS) for _ in range(generator.randint(_SHORTEST, _LONGEST)))
        voice = f"{generator.choice(ACCENTS)}+{generator.choice(SPEAKERS[split].split())}"
        waveform = _speak(
            digits,
            voice=voice,
            words_per_minute=generator.randint(130, 220),
            pitch=generator.randint(30, 70),
            gap=generator.randint(0, 8),
        )
        if len(waveform) <= window:
            return Spoken(waveform, digits)


def _speak(digits: Sequence[int], *, voice: str, words_per_minute: int, pitch: int, gap: int) -> Tensor:
    options = {"-v": voice, "-s": words_per_minute, "-p": pitch, "-g": gap}
    command = ["espeak-ng", *(str(word) for option in options.items() for word in option), "--stdout"]
    made = subprocess.run([*command, " ".join(map(str, digits))], capture_output=True, check=False)
    if made.returncode or not made.stdout:
        raise DataError(
            f"espeak-ng cannot speak: {made.stderr.decode(errors='replace').strip()}",
            where="data",
            value=" ".join(command),
            hint="apt-get install --reinstall espeak-ng espeak-ng-data",
        )
    with wave.open(BytesIO(made.stdout)) as file:
        waveform = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return _trimmed(resample_poly(waveform / 32768, RATE, file.getframerate()))


def _trimmed(waveform: np.ndarray) -> Tensor:
    """Cut what is quieter than 2 % of the peak off both ends, and bring the peak to a half."""
    peak = np.abs(waveform).max()
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * peak)
    return torch.from_numpy((waveform[loud[0] : loud[-1] + 1] / peak * 16384).astype(np.int16))


def _stretched(waveform: Tensor, factor: float) -> Tensor:
    """Play a waveform slower by a factor, and lower; faster below 1."""
    length = int(len(waveform) * factor)
    return functional.interpolate(waveform[None, None], size=length, mode="linear", align_corners=True)[0, 0]


def _float(waveform: Tensor) -> Tensor:
    return waveform.float() / 32768


def _source() -> bytes:
    return Path(__file__).read_bytes()


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))
