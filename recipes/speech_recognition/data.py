"""Strings of digits in one language or more: real recordings of a voice in each, and a synthesizer's many voices.

Train knows the recordings and some of the synthesizer's voices; val and test have other voices of it, each its own.
What the synthesizer speaks is made once, and kept in `digits/` of mil's cache folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from voices import DIGITS, LONGEST, RATE, RECORDED, SHORTEST, Spoken, padded, recorded_digits, synthesized

from mil_cli.data.speech import coloured_noise, mix
from mil_cli.errors import DataError
from mil_cli.models.user_code import source_sha256

FRAME, HOP = 200, 80  # samples: 25 ms every 10 ms

_RECORDED_SHARE = 0.3  # of what train reads
_SLOWEST = 1.15  # times what a recording takes
_NOISE_DB = 10.0, 30.0  # ratio of speech to noise


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
        return log_mel(noisy, self._bins), padded([digit + 1 for digit in digits])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the recordings, and of what is made of them."""
        said = [string.digits for string in self._strings]
        digest = hashlib.sha256(
            repr((said, self._samples, self._window, self._bins, source_sha256(ConnectedDigits))).encode()
        )
        waveforms = [string.waveform for string in self._strings] + [each for voice in self._recorded for each in voice]
        for waveform in waveforms:
            digest.update(waveform.numpy().tobytes())
        return digest.hexdigest()

    def _drawn(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return a string that the synthesizer spoke, a little faster or slower, and what is said."""
        string = self._strings[_below(len(self._strings))]
        longest = self._window / len(string.waveform)
        return _stretched(_float(string.waveform), min(longest, 0.8 + 0.45 * float(torch.rand(())))), string.digits

    def _joined(self) -> tuple[Tensor, tuple[int, ...]]:
        """Return recorded digits with pauses between them, as many as the window holds, and what is said."""
        voice = self._recorded[_below(len(self._recorded))]
        factor = 0.75 + (_SLOWEST - 0.75) * float(torch.rand(()))
        parts: list[Tensor] = []
        digits: list[int] = []
        length = 0
        for _ in range(SHORTEST + _below(LONGEST - SHORTEST + 1)):
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


def build(
    root: str | Path | None = None,
    languages: Sequence[str] = ("en",),
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
        languages: Of "en", "es", "fr", "it" and "ru"; a digit is the same token in all of them.
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
    if not languages or not set(languages) <= set(RECORDED):
        raise DataError(
            "there are no voices for a language",
            where="data.languages",
            value=list(languages),
            hint=f"give some of {', '.join(RECORDED)}",
        )
    if seconds < SHORTEST:
        raise DataError("a slow digit takes a second", where="data.seconds", value=seconds, hint="give 3 or more")
    window = round(seconds * RATE)
    recorded = recorded_digits(None if root is None else Path(root), languages)
    longest = _SLOWEST * max(len(digit) for voice in recorded for digit in voice)
    if longest > window:
        raise DataError(
            "a recorded digit, played slowly, does not fit into the window",
            where="data.seconds",
            value=seconds,
            hint=f"give {math.ceil(10 * longest / RATE) / 10:g} or more, or shorter recordings",
        )

    def split(name: str, strings: int, samples: int | None) -> ConnectedDigits:
        spoken = synthesized(name, strings, window=window, languages=tuple(languages))
        return ConnectedDigits(spoken, recorded if samples else (), samples, window=window, bins=bins)

    return {
        "train": split("train", train_strings, train_samples),
        "val": split("val", val_samples, None),
        "test": split("test", test_samples, None),
    }


def _stretched(waveform: Tensor, factor: float) -> Tensor:
    """Play a waveform slower by a factor, and lower; faster below 1."""
    length = int(len(waveform) * factor)
    return functional.interpolate(waveform[None, None], size=length, mode="linear", align_corners=True)[0, 0]


def _float(waveform: Tensor) -> Tensor:
    return waveform.float() / 32768


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))
