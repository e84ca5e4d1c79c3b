"""Speech denoising by masks: spectra of a noisy waveform in, a mask out; SI-SDR and its improvement on waveforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.entry_task import EntryTask
from mil_cli.task.fields import check_choice

_LOSSES = ("si_sdr", "spectral")
_TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Denoising(EntryTask):
    """A mask over the short-time spectrum of a noisy waveform.

    Batches hold waveforms of shape (batch, samples), noisy and clean. The model gets magnitudes of shape (batch, bins,
    frames) with bins = window / 2 + 1, and for each of `state_shapes` zeros, which is what a stream begins with. It
    gives masks of the magnitudes' shape, and may give more, such as its new state. The transform and its inverse
    are no part of the model: frames of a square root of a Hann window, every half window.

    Attributes:
        loss_kind: ``si_sdr`` or ``spectral``; see `si_sdr_loss` and `spectral_loss`.
        window: Samples of a frame, even.
        limit: For ``si_sdr``: dB from which a better estimate gains nothing.
        compression: For ``spectral``: exponent of the magnitudes.
        state_shapes: Shapes of the states that the model takes after the magnitudes, without the batch axis.
        input_keys: As in `EntryTask`; must give one waveform. The target is the clean one, the scored output the mask.
    """

    name: ClassVar[str] = "denoising"

    loss_kind: str = "si_sdr"
    window: int = 256
    limit: float = 30.0
    compression: float = 0.3
    state_shapes: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        check_choice(self.loss_kind, _LOSSES, where="task.loss_kind")
        if self.window < 2 or self.window % 2:
            raise TaskError("must be even and at least 2", where="task.window", value=self.window)
        if not 0 < self.compression <= 1:
            raise TaskError("must be above 0 and at most 1", where="task.compression", value=self.compression)
        if not 0 < self.limit < math.inf:
            raise TaskError("must be above 0", where="task.limit", value=self.limit)
        for shape in self.state_shapes:
            if not isinstance(shape, Sequence) or any(not isinstance(size, int) or size < 1 for size in shape):
                raise TaskError(
                    "a shape is a list of whole numbers above 0",
                    where="task.state_shapes",
                    value=self.state_shapes,
                    hint="give one list for each state, such as [[48, 126]]",
                )

    @property
    def metric_name(self) -> str:
        """What reports call the metric: the mean over waveforms, in dB."""
        return "SI-SDR improvement"

    @property
    def higher_is_better(self) -> bool:
        """An improvement: yes."""
        return True

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the magnitudes of the noisy waveforms, and zeros for the states."""
        noisy = self._noisy(batch)
        states = (noisy.new_zeros(len(noisy), *shape) for shape in self.state_shapes)
        return (stft(noisy, window=self.window).abs(), *states), {}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the mean loss over the waveforms.

        Raises:
            TaskError: Mask and spectrum, or noisy and clean waveforms, do not fit.
        """
        noisy, clean = self._noisy(batch), self._clean(batch)
        return self._apart(self._masked(outputs, noisy), stft(clean, window=self.window), clean)

    def metric(self) -> Metric:
        """Return a fresh mean."""
        return MeanMetric(nan_strategy="disable")

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch: by how much each estimate's SI-SDR is above that of the noisy waveform.

        Raises:
            TaskError: Mask and spectrum, or noisy and clean waveforms, do not fit.
        """
        noisy, clean = self._noisy(batch), self._clean(batch)
        estimate = istft(self._masked(outputs, noisy), window=self.window, length=clean.shape[-1])
        before, after = (scale_invariant_signal_distortion_ratio(each, clean) for each in (noisy, estimate))
        metric.update(after - before)

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> Tensor:
        """Return the loss with the teacher's estimate in place of the clean speech; a temperature has no meaning."""
        noisy = self._noisy(batch)
        student, teacher = (self._masked(outputs, noisy) for outputs in (student_outputs, teacher_outputs))
        return self._apart(student, teacher, istft(teacher, window=self.window, length=noisy.shape[-1]))

    def _apart(self, estimate: Tensor, wanted: Tensor, waveform: Tensor) -> Tensor:
        """Return the loss of an estimated spectrum against the wanted one, whose waveform is given too."""
        if self.loss_kind == "spectral":
            return spectral_loss(estimate, wanted, compression=self.compression)
        return si_sdr_loss(istft(estimate, window=self.window, length=waveform.shape[-1]), waveform, limit=self.limit)

    def _noisy(self, batch: Batch) -> Tensor:
        args, kwargs = super().inputs(batch)
        found = [*args, *kwargs.values()]
        if len(found) != 1 or found[0].ndim != 2 or found[0].shape[-1] < self.window:
            raise TaskError(
                "the noisy waveforms must be one tensor of shape (batch, samples), of at least one window",
                where="task.input_keys",
                value=[tuple(each.shape) for each in found],
                hint="set task.input_keys to the one entry that holds them",
            )
        return torch.as_tensor(found[0])

    def _clean(self, batch: Batch) -> Tensor:
        clean, noisy = self._target(batch), self._noisy(batch)
        if clean.shape != noisy.shape:
            raise TaskError(
                f"clean waveforms of shape {tuple(clean.shape)} do not fit noisy ones of {tuple(noisy.shape)}",
                where="task.target_key",
                hint="both must be (batch, samples)",
            )
        return clean

    def _masked(self, outputs: Any, noisy: Tensor) -> Tensor:
        mask, spectrum = self._scored(outputs), stft(noisy, window=self.window)
        if mask.shape != spectrum.shape:
            raise TaskError(
                f"a mask of shape {tuple(mask.shape)} does not fit a spectrum of shape {tuple(spectrum.shape)}",
                where="task",
                hint="the model must give (batch, bins, frames), as it gets them",
            )
        return mask * spectrum


def stft(waveform: Tensor, *, window: int) -> Tensor:
    """Return the short-time spectrum.

    Args:
        waveform: Shape (batch, samples).
        window: Samples of a frame; frames begin every half of it, the first one half a window before the waveform.

    Returns:
        Complex, of shape (batch, window / 2 + 1, samples // (window / 2) + 1).
    """
    shape = _shape(window, waveform)
    return torch.stft(waveform, window, window // 2, window=shape, pad_mode="constant", return_complex=True)


def istft(spectrum: Tensor, *, window: int, length: int) -> Tensor:
    """Return the waveform, of shape (batch, `length`), whose short-time spectrum is nearest; see `stft`."""
    return torch.istft(spectrum, window, window // 2, window=_shape(window, spectrum), length=length)


def si_sdr_loss(estimate: Tensor, wanted: Tensor, *, limit: float) -> Tensor:
    """Return how far the scale-invariant signal-to-distortion ratio is below `limit` dB; 0 for a perfect estimate.

    Le Roux et al. 2019, "SDR - half-baked or well done?" (arXiv:1811.02508), with the soft limit of Wisdom et al.
    2020, "Unsupervised sound separation using mixture invariant training" (arXiv:2006.12701).

    Args:
        estimate: Waveforms of shape (batch, samples).
        wanted: Of the same shape.
        limit: In dB.

    Returns:
        The mean over the batch of 10 log10(1 + 10^(limit/10) |distortion|^2 / |signal|^2), where the signal is the
        wanted waveform scaled to lie nearest to the estimate, and the distortion the rest.
    """
    shared = functional.cosine_similarity(estimate, wanted, dim=-1).square()  # share of the energy that is signal
    ratio = (1 - shared) / (shared + _TINY)
    return (10 / math.log(10) * torch.log1p(10 ** (limit / 10) * ratio)).mean()


def spectral_loss(estimate: Tensor, wanted: Tensor, *, compression: float) -> Tensor:
    """Return the mean squared difference of magnitudes to the power of `compression`.

    Ephrat et al. 2018, "Looking to listen at the cocktail party" (arXiv:1804.03619), without the phase, which a mask
    does not change.

    Args:
        estimate: Complex spectra of any shape.
        wanted: Of the same shape.
        compression: Exponent, above 0 and at most 1.
    """
    powers = [(spectrum.abs() + _TINY) ** compression for spectrum in (estimate, wanted)]
    return (powers[0] - powers[1]).square().mean()


def _shape(window: int, like: Tensor) -> Tensor:
    return torch.hann_window(window, device=like.device).sqrt()
