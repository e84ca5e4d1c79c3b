"""Runs a denoiser's ONNX file as a device would: frame by frame, its state carried from call to call, on one thread.

Command: python recipes/audio_denoising/stream.py runs/audio_denoising/latest/model.onnx SPEECH.wav --snr 0

Prints the real-time factor (the time that a frame takes over the time until the next one comes), and by how much the
output differs from that of the same file on the whole recording at once.
"""

from __future__ import annotations

import argparse
import time
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from mil_cli.data.speech import coloured_noise, mix, read_wav
from mil_cli.errors import ExportError, MilError
from mil_cli.export.session import open_session
from mil_cli.task.denoising import istft, stft

Array = npt.NDArray[np.float32]


class MaskFile:
    """An ONNX file that maps magnitudes (batch, bins, frames) and a state to masks and the next state.

    Args:
        path: The file.

    Raises:
        ExportError: It cannot be loaded, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_session(path, threads=1)
        inputs = self._session.get_inputs()
        if len(inputs) != 2 or any(len(each.shape) != 3 for each in inputs) or isinstance(inputs[0].shape[2], int):
            raise ExportError(
                f"{path} is no file of this recipe: it must take magnitudes of any number of frames, and a state",
                value=[(each.name, each.shape) for each in inputs],
                hint="give the model.onnx or baseline.onnx of a run of recipes/audio_denoising/recipe.yaml",
            )
        self._names = [each.name for each in inputs]
        self.window = 2 * (inputs[0].shape[1] - 1)
        self.start: Array = np.zeros((1, *inputs[1].shape[1:]), dtype=np.float32)

    def __call__(self, magnitude: Array, state: Array) -> tuple[Array, Array]:
        """Return masks of the magnitudes' shape, and the next state."""
        mask, following = self._session.run(None, dict(zip(self._names, (magnitude, state), strict=True)))
        return mask, following


class Stream:
    """Denoises half a window of samples at a time.

    Args:
        file: The denoiser.
    """

    def __init__(self, file: MaskFile) -> None:
        self._file = file
        self._state = file.start
        self._shape = np.sqrt(np.hanning(file.window + 1)[:-1])
        self._heard = np.zeros(file.window)
        self._overlap = np.zeros(file.window // 2)

    def __call__(self, samples: Array) -> Array:
        """Return the denoised half window that lies before the one given."""
        half = len(samples)
        self._heard = np.concatenate([self._heard[half:], samples])
        spectrum = np.fft.rfft(self._shape * self._heard)
        mask, self._state = self._file(np.abs(spectrum).astype(np.float32)[None, :, None], self._state)
        frame = self._shape * np.fft.irfft(mask[0, :, 0] * spectrum)
        denoised = self._overlap + frame[:half]
        self._overlap = frame[half:]
        return denoised.astype(np.float32)


def frame_by_frame(file: MaskFile, noisy: Array) -> tuple[Array, list[float]]:
    """Denoise a recording as it comes.

    Args:
        file: The denoiser.
        noisy: Shape (samples,).

    Returns:
        The denoised recording, of the same shape, and the seconds that each frame took.
    """
    stream, half = Stream(file), file.window // 2
    denoised, seconds = [], []
    for samples in np.pad(noisy, (0, half + -len(noisy) % half)).reshape(-1, half):
        began = time.perf_counter()
        denoised.append(stream(samples))
        seconds.append(time.perf_counter() - began)
    return np.concatenate(denoised)[half:][: len(noisy)], seconds


def at_once(file: MaskFile, noisy: Array) -> Array:
    """Denoise a recording of shape (samples,) in one call of the file."""
    # Filled up to half windows, as a stream is: the last samples would else be in one frame less.
    filled = functional.pad(torch.from_numpy(noisy)[None], (0, -len(noisy) % (file.window // 2)))
    spectrum = stft(filled, window=file.window)
    mask, _ = file(spectrum.abs().numpy(), file.start)
    denoised: Array = istft(torch.from_numpy(mask) * spectrum, window=file.window, length=len(noisy))[0].numpy()
    return denoised


def main(arguments: list[str] | None = None) -> None:
    """Denoise a file, and print how fast, how near to the whole recording at once, and how well."""
    parser = argparse.ArgumentParser(description="Denoise a recording frame by frame.")
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("speech", type=Path, help="a WAV file of one channel and 16 bits")
    parser.add_argument("--snr", type=float, help="add pink noise at this ratio, in dB")
    parser.add_argument("--rate", type=int, default=8000, help="sample rate of the file, in Hz")
    parser.add_argument("--out", type=Path, help="write the denoised recording to this WAV file")
    wanted = parser.parse_args(arguments)
    try:
        file = MaskFile(wanted.model)
        clean = read_wav(wanted.speech, sample_rate=wanted.rate)
    except MilError as problem:
        parser.error(str(problem))
    torch.manual_seed(0)
    noisy = clean if wanted.snr is None else mix(clean, coloured_noise(len(clean), "pink"), snr=wanted.snr)
    denoised, seconds = frame_by_frame(file, noisy.numpy())
    p50, p95 = np.percentile(seconds, [50, 95]) * wanted.rate / (file.window // 2)
    print(f"real-time factor: p50 {p50:.4f}, p95 {p95:.4f} ({len(seconds)} frames, one thread)")
    apart = np.abs(denoised - at_once(file, noisy.numpy())).max()
    print(f"largest difference to the whole recording at once: {apart:.1e}")
    if wanted.snr is not None:
        ratios = [scale_invariant_signal_distortion_ratio(each, clean) for each in (noisy, torch.from_numpy(denoised))]
        print(f"SI-SDR: {ratios[0]:.1f} dB noisy, {ratios[1]:.1f} dB denoised")
    if wanted.out is not None:
        with wave.open(str(wanted.out), "wb") as output:
            output.setparams((1, 2, wanted.rate, 0, "NONE", "not compressed"))
            output.writeframes((denoised.clip(-1, 1) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
