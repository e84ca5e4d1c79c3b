"""Transforms, losses and metric of denoising against their formulas on mixtures whose parts are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.denoising import Denoising, istft, si_sdr_loss, stft

SAMPLES, WINDOW = 1600, 64


def orthogonal() -> tuple[Tensor, Tensor]:
    """Return waveforms of shape (2, SAMPLES) and energy 1, at right angles to each other."""
    clean, noise = torch.randn(2, 2, SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = clean / clean.norm(dim=-1, keepdim=True)
    noise = noise - (noise * clean).sum(-1, keepdim=True) * clean
    return clean.float(), (noise / noise.norm(dim=-1, keepdim=True)).float()


def tones() -> tuple[Tensor, Tensor]:
    """Return a low and a high tone, of shape (1, SAMPLES), that share no bin."""
    times = torch.arange(SAMPLES) / WINDOW
    low, high = ((2 * math.pi * bin * times).sin()[None] for bin in (6, 24))
    return low, high


def score(task: Denoising, mask: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    metric = task.metric()
    task.update(metric, mask, batch)
    return float(metric.compute())


def test_a_frame_is_the_transform_of_its_window_and_the_inverse_gives_the_waveform() -> None:
    waveform, _ = orthogonal()
    spectrum = stft(waveform, window=WINDOW)
    half = WINDOW // 2
    assert spectrum.shape == (2, half + 1, SAMPLES // half + 1)
    padded = np.pad(waveform[1].numpy(), half)
    shape = np.sin(np.pi * np.arange(WINDOW) / WINDOW)  # the square root of a Hann window
    for frame in (0, 7, SAMPLES // half):
        expected = np.fft.rfft(shape * padded[frame * half : frame * half + WINDOW])
        assert np.abs(spectrum[1, :, frame].numpy() - expected).max() < 1e-6
    assert torch.allclose(istft(spectrum, window=WINDOW, length=SAMPLES), waveform, atol=1e-6)


def test_magnitudes_and_zeros_go_in() -> None:
    noisy, clean = orthogonal()
    task = Denoising(window=WINDOW, state_shapes=[[3, 5], [7]])
    assert isinstance(task, Task)
    (magnitude, first, second), named = task.inputs((noisy, clean))
    assert torch.equal(magnitude, stft(noisy, window=WINDOW).abs())
    assert named == {}
    assert torch.equal(first, torch.zeros(2, 3, 5))
    assert torch.equal(second, torch.zeros(2, 7))


@pytest.mark.parametrize("ratio", [0.001, 0.1, 1.0, 10.0])
def test_si_sdr_loss_of_a_known_mixture(ratio: float) -> None:
    """Noise at right angles to the speech is all of the distortion, at any scale of the estimate."""
    clean, noise = orthogonal()
    estimate = 3.7 * (clean + ratio**0.5 * noise)
    assert float(si_sdr_loss(estimate, clean, limit=30.0)) == pytest.approx(10 * math.log10(1 + 1000 * ratio), abs=0.01)
    far = float(si_sdr_loss(estimate, clean, limit=60.0))  # the limit is far away: nothing but the ratio itself
    assert 60 - far == pytest.approx(float(scale_invariant_signal_distortion_ratio(estimate, clean).mean()), abs=0.05)


def test_si_sdr_loss_at_its_ends() -> None:
    clean, noise = orthogonal()
    assert float(si_sdr_loss(0.2 * clean, clean, limit=30.0)) == pytest.approx(0.0, abs=0.01)
    silent = torch.zeros_like(clean, requires_grad=True)
    worst = si_sdr_loss(silent, clean, limit=30.0)
    worst.backward()  # type: ignore[no-untyped-call]
    assert float(worst.detach()) > float(si_sdr_loss(noise + 0.01 * clean, clean, limit=30.0))
    assert silent.grad is not None
    assert bool(silent.grad.isfinite().all())


def test_the_improvement_is_what_the_mask_takes_from_the_noise() -> None:
    speech, noise = tones()
    batch = (speech + noise, speech)
    task = Denoising(window=WINDOW)
    mask = torch.ones(1, WINDOW // 2 + 1, SAMPLES // (WINDOW // 2) + 1)
    assert score(task, mask, batch) == pytest.approx(0.0, abs=1e-3)
    assert score(task, 0.3 * mask, batch) == pytest.approx(0.0, abs=1e-3)  # whatever the scale
    mask[:, 15:] = 0.1
    assert score(task, mask, batch) == pytest.approx(20.0, abs=0.1)
    assert task.higher_is_better


def test_the_improvement_is_the_mean_over_waveforms_of_all_batches() -> None:
    noisy, clean = orthogonal()
    task = Denoising(window=WINDOW)
    masks = torch.rand(2, WINDOW // 2 + 1, SAMPLES // (WINDOW // 2) + 1, generator=torch.Generator().manual_seed(1))
    noisy = noisy + clean
    metric = task.metric()
    for one in range(2):
        task.update(metric, masks[one : one + 1], (noisy[one : one + 1], clean[one : one + 1]))
    assert float(metric.compute()) == pytest.approx(score(task, masks, (noisy, clean)), abs=1e-4)


def test_spectral_loss_of_a_constant_mask() -> None:
    clean, _ = orthogonal()
    task = Denoising(window=WINDOW, loss_kind="spectral", compression=0.5)
    magnitude = stft(clean, window=WINDOW).abs()
    expected = float(magnitude.mean()) * (0.25**0.5 - 1) ** 2
    assert float(task.loss(torch.full_like(magnitude, 0.25), (clean, clean))) == pytest.approx(expected, rel=1e-3)


def test_the_distance_is_the_loss_against_what_the_teacher_hears() -> None:
    noisy, clean = orthogonal()
    task = Denoising(window=WINDOW)
    spectrum = stft(noisy, window=WINDOW)
    student, teacher = torch.rand(2, *spectrum.shape, generator=torch.Generator().manual_seed(2))
    heard = istft(teacher * spectrum, window=WINDOW, length=SAMPLES)
    distance = float(task.distance((student, None), (teacher, None), (noisy, clean), temperature=4.0))
    assert distance == pytest.approx(float(task.loss(student, (noisy, heard))))
    assert float(task.distance(teacher, teacher, (noisy, clean), temperature=1.0)) == pytest.approx(0.0, abs=0.01)


def test_spectral_distance_of_constant_masks() -> None:
    noisy, clean = orthogonal()
    task = Denoising(window=WINDOW, loss_kind="spectral", compression=0.5)
    magnitude = stft(noisy, window=WINDOW).abs()
    student, teacher = torch.full_like(magnitude, 0.25), torch.full_like(magnitude, 0.81)
    distance = float(task.distance(student, teacher, (noisy, clean), temperature=1.0))
    assert distance == pytest.approx(float(magnitude.mean()) * (0.5 - 0.9) ** 2, rel=1e-3)


def test_what_does_not_fit_is_told() -> None:
    noisy, clean = orthogonal()
    task = Denoising(window=WINDOW)
    with pytest.raises(TaskError, match="mask of shape"):
        task.loss(torch.zeros(2, 5, 5), (noisy, clean))
    with pytest.raises(TaskError, match=r"task\.target_key: clean waveforms"):
        task.loss(torch.zeros(2, 5, 5), (noisy, clean[:, :-1]))
    with pytest.raises(TaskError, match=r"task\.input_keys"):
        task.inputs((noisy, clean, clean))
    with pytest.raises(TaskError, match=r"task\.input_keys.*at least one window"):
        task.inputs((noisy[:, :10], clean[:, :10]))
    with pytest.raises(TaskError, match=r"task\.window"):
        Denoising(window=63)
    with pytest.raises(TaskError, match=r"task\.compression"):
        Denoising(compression=0.0)
    with pytest.raises(TaskError, match=r"task\.loss_kind"):
        Denoising(loss_kind="sdr")
    with pytest.raises(TaskError, match=r"task\.limit"):
        Denoising(limit=0.0)
    with pytest.raises(TaskError, match=r"task\.state_shapes[\s\S]*one list for each state"):
        Denoising(state_shapes=[48, 126])  # type: ignore[list-item]
