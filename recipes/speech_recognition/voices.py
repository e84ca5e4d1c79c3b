"""Who says digits: real recordings of one voice a language, and the many voices of a synthesizer."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import wave
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from scipy.signal import resample_poly
from torch import Tensor

from mil_cli.data.speech import DEBIAN_FOLDER, missing_packages, read_wav
from mil_cli.errors import DataError
from mil_cli.files import writing
from mil_cli.models.user_code import source_sha256
from mil_cli.run.cache import default_location

RATE = 8000  # Hz, of the recordings
DIGITS = 10
SHORTEST, LONGEST = 3, 5  # digits of a string
PAD = -100  # behind the end of a string's digits

RECORDED = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
"""The recorded voice of each language."""

ACCENTS = {
    "en": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc"),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be", "fr-ch"),
    "it": ("it",),
    "ru": ("ru", "ru-lv"),
}
"""How the synthesizer speaks each language."""

SPEAKERS = {
    "train": "adam Alex Alicia Andrea Andy antonio belinda benjamin boris caleb david Denis Diogo ed edward edward2 f1 "
    "f3 Gene Gene2 grandma grandpa gustave Henrique Hugo iven iven2 Jacky john klatt2 klatt4 Lee linda m1 m2 m3 m7 "
    "marcelo Marco Mario michel miguel Mike Nguyen norbert pablo pedro quincy rob sandro shelby steph steph2 travis "
    "zac",
    "val": "f2 f5 m4 m5 robert victor",
    "test": "Annie anika aunty f4 m6 m8 max Michael paul steph3",
}
"""The synthesizer's voices of each split, without those that whisper, croak or play robots; voices whose first formants
are moved apart by a quarter or more, or up by two fifths, as in no adult's mouth, are for training alone."""


@dataclass(frozen=True)
class Spoken:
    """A recording.

    Attributes:
        waveform: int16 of shape (samples,), at 8 kHz, without silence around.
        digits: What is said.
    """

    waveform: Tensor
    digits: tuple[int, ...]


def recorded_digits(root: Path | None = None, languages: Sequence[str] = tuple(RECORDED)) -> list[list[Tensor]]:
    """Return the ten digits of each recorded voice, int16 of shape (samples,).

    Args:
        root: A folder with `digits/0.wav` to `digits/9.wav` in a folder for each voice; None: where Debian's packages
            put the recordings of a voice a language.
        languages: Keys of `RECORDED`: whose voices are read where no folder is given.

    Raises:
        DataError: The recordings are missing or cannot be read.
    """
    folder, voices = DEBIAN_FOLDER, tuple(RECORDED[language] for language in languages)
    if root is not None:
        folder, voices = root, tuple(sorted(path.parents[1].name for path in root.glob("*/digits/0.wav")))
    if root is None and (missing := missing_packages(languages)):
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
    return [[_trimmed(read_wav(file, sample_rate=RATE).numpy(), str(file)) for file in voice] for voice in files]


def synthesized(split: str, count: int, *, window: int, languages: Sequence[str]) -> list[Spoken]:
    """Return strings of 3 to 5 digits that fit into a window, spoken by the voices of a split in some languages.

    Raises:
        DataError: The synthesizer is missing or fails.
    """
    if shutil.which("espeak-ng") is None:
        raise DataError("the synthesizer espeak-ng is missing", where="data", hint="apt-get install espeak-ng")
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, check=True).stdout
    facts = repr((split, count, window, tuple(languages), version, source_sha256(synthesized)))
    file = default_location() / "digits" / f"{split}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
    try:
        return _unpacked(safetensors.torch.load_file(file))
    except (FileNotFoundError, safetensors.SafetensorError, KeyError):
        pass  # not made yet, or damaged
    with ThreadPoolExecutor() as pool:
        strings = list(pool.map(lambda number: _fitting(split, number, window, languages), range(count)))
    with writing(file) as temporary:
        safetensors.torch.save_file(_packed(strings), temporary)
    return strings


def padded(digits: Sequence[int]) -> Tensor:
    """Return digits as int64 of shape (longest string,)."""
    return torch.nn.functional.pad(torch.tensor(digits), (0, LONGEST - len(digits)), value=PAD)


def _packed(strings: Sequence[Spoken]) -> dict[str, Tensor]:
    return {
        "waveforms": torch.cat([string.waveform for string in strings]),
        "lengths": torch.tensor([len(string.waveform) for string in strings]),
        "digits": torch.stack([padded(string.digits) for string in strings]),
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> list[Spoken]:
    waveforms = tensors["waveforms"].split(tensors["lengths"].tolist())
    digits = [tuple(digit for digit in row if digit != PAD) for row in tensors["digits"].tolist()]
    return [Spoken(*each) for each in zip(waveforms, digits, strict=True)]


def _fitting(split: str, number: int, window: int, languages: Sequence[str]) -> Spoken:
    generator = random.Random(f"{split} {number}")
    while True:
        digits = tuple(generator.randrange(DIGITS) for _ in range(generator.randint(SHORTEST, LONGEST)))
        accents = ACCENTS[generator.choice(languages)]
        voice = f"{generator.choice(accents)}+{generator.choice(SPEAKERS[split].split())}"
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
        return _trimmed(resample_poly(waveform / 32768, RATE, file.getframerate()), " ".join(command))


def _trimmed(waveform: np.ndarray, origin: str) -> Tensor:
    """Cut what is quieter than 2 % of the peak off both ends, and bring the peak to a half.

    Args:
        waveform: Of shape (samples,).
        origin: Where it is from, for people.

    Raises:
        DataError: Nothing can be heard.
    """
    peak = np.abs(waveform).max(initial=0)
    if not peak:
        raise DataError("a recording of a digit is silent", where="data.root", value=origin, hint="record it again")
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * peak)
    return torch.from_numpy((waveform[loud[0] : loud[-1] + 1] / peak * 16384).astype(np.int16))
