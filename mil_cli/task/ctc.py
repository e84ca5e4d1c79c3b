"""Sequence labelling with CTC: the loss, greedy decoding, and token or word error rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.text import WordErrorRate

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.divergence import softened_divergence
from mil_cli.task.entry_task import ClassTask
from mil_cli.task.fields import (
    Entry,
    check_choice,
    entry,
    model_inputs,
    no_class_scores,
    target_entry,
    tensor_entry,
)


@dataclass(frozen=True, kw_only=True)
class Ctc(ClassTask):
    """Connectionist temporal classification (Graves et al. 2006).

    The model gives scores before softmax of shape (batch, frames, classes). Batches are dicts, or the tuples of
    `pad_collate`: (inputs, input lengths, targets, target lengths); the lengths may be left out.

    Attributes:
        blank: Class of the blank.
        unit: What an error is counted in: ``token``, or ``word`` (runs of tokens between separators).
        word_separator: Token that ends a word.
        subsampling: Input steps per output frame; None: frames in proportion to the padded input's length.
        time_axis: Time axis of the (first) padded input.
        batch_first: Whether outputs are (batch, frames, classes), else (frames, batch, classes).
        pad_value: What fills targets behind their end, where there are no target lengths.
        input_keys: See `InputEntries`; None: the first entry of a tuple, or all of a dict but target and lengths.
        target_key: The entry with the target tokens; None: position 2 of a tuple of four, else the last, or the usual
            key of a dict.
        input_lengths_key: The entry with the inputs' lengths; None: position 1 of four, or ``input_lengths``,
            ``inputs_lengths``, or the one other key that ends in ``_lengths``.
        target_lengths_key: The entry with the targets' lengths; None: position 3 of four, or ``target_lengths`` or
            ``<target>_lengths``.
    """

    name: ClassVar[str] = "ctc"

    blank: int = 0
    unit: str = "token"
    word_separator: int | None = None
    subsampling: int | None = None
    time_axis: int = 1
    batch_first: bool = True
    pad_value: int = -100
    input_lengths_key: Entry | None = None
    target_lengths_key: Entry | None = None

    def __post_init__(self) -> None:
        check_choice(self.unit, ("token", "word"), where="task.unit")
        if self.unit == "word" and self.word_separator is None:
            raise TaskError(
                "words need a separator", where="task.word_separator", hint="set it to the token of a space"
            )
        if self.blank < 0:
            raise TaskError("must be at least 0", where="task.blank", value=self.blank)
        if self.subsampling is not None and self.subsampling < 1:
            raise TaskError("must be at least 1", where="task.subsampling", value=self.subsampling)

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return f"{self.unit} error rate"

    @property
    def higher_is_better(self) -> bool:
        """An error rate: no."""
        return False

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments."""
        target, input_lengths, target_lengths = self._entries(batch)
        if not isinstance(batch, Mapping) and self.input_keys is None:
            return (entry(batch, 0, where="task.input_keys"),), {}
        without = [key for key in (target, input_lengths, target_lengths) if key is not None]
        return model_inputs(batch, self.input_keys, without=without)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the CTC loss in nats: per sample divided by the target's length, mean over the batch.

        Samples whose target does not fit into their frames count 0.

        Raises:
            TaskError: Scores and targets do not fit.
        """
        scores, frames, targets, lengths = self._read(outputs, batch)
        log_probabilities = functional.log_softmax(scores.float(), dim=-1).transpose(0, 1)
        return functional.ctc_loss(
            log_probabilities, targets.clamp(min=0), frames, lengths, blank=self.blank, zero_infinity=True
        )

    def metric(self) -> Metric:
        """Return a fresh error rate: insertions, deletions and substitutions over the length of the targets."""
        return WordErrorRate()

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Decode one batch greedily and count its errors.

        Raises:
            TaskError: Scores and targets do not fit.
        """
        scores, frames, targets, lengths = self._read(outputs, batch)
        decoded = [self._text(tokens) for tokens in greedy_decode(scores, frames, blank=self.blank)]
        wanted = [self._text(row[:length].tolist()) for row, length in zip(targets, lengths.tolist(), strict=True)]
        metric.update(decoded, wanted)

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return T^2 KL(teacher || student) of the softened classes, mean over the frames that are not padding."""
        student, frames, _, _ = self._read(student_outputs, batch)
        teacher = self._scores(teacher_outputs)
        divergence = softened_divergence(student, teacher, temperature=temperature)
        counts = torch.arange(student.shape[1], device=student.device) < frames.to(student.device).unsqueeze(1)
        return (divergence * counts).sum() / counts.sum().clamp(min=1)

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: targets are not aligned to frames, so that no frame has a label.

        Raises:
            TaskError: Always.
        """
        raise no_class_scores(self.name, "its frames have no labels")

    def _text(self, tokens: list[int]) -> str:
        if self.unit == "token":
            return " ".join(map(str, tokens))
        words: list[list[int]] = [[]]
        for token in tokens:
            if token == self.word_separator:
                words.append([])
            else:
                words[-1].append(token)
        return " ".join("-".join(map(str, word)) for word in words if word)

    def _scores(self, outputs: Any) -> torch.Tensor:
        scores = self._scored(outputs)
        if scores.ndim != 3:
            raise TaskError(
                f"scores must have three axes and have shape {tuple(scores.shape)}",
                where="task",
                hint="the model must give (batch, frames, classes)",
            )
        return scores if self.batch_first else scores.transpose(0, 1)

    def _read(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = self._scores(outputs)
        target_key, input_lengths_key, target_lengths_key = self._entries(batch)
        targets = tensor_entry(batch, target_key, where="task.target_key")
        if targets.ndim != 2 or targets.is_floating_point() or len(targets) != len(scores):
            raise TaskError(
                f"targets must be integer tokens of shape (batch, length), and are {targets.dtype} of shape"
                f" {tuple(targets.shape)} for {len(scores)} samples",
                where="task.target_key",
                hint="pad them with mil_cli.data.collate.pad_collate",
            )
        if target_lengths_key is None:
            lengths = (targets != self.pad_value).sum(1)
        else:
            lengths = tensor_entry(batch, target_lengths_key, where="task.target_lengths_key").long()
        if self.blank >= scores.shape[-1]:
            raise TaskError(
                f"the model has {scores.shape[-1]} classes (0 to {scores.shape[-1] - 1}), and none for the blank",
                where="task.blank",
                value=self.blank,
                hint="set the class of the blank, or give the model one more",
            )
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > targets.shape[1]):
            raise TaskError(
                f"the targets' lengths run from {int(lengths.min())} to {int(lengths.max())}, but they are padded to"
                f" {targets.shape[1]}",
                where="task.target_lengths_key",
                hint="check what the collate function returns: the lengths belong to the targets before padding",
            )
        inside = torch.arange(targets.shape[1], device=targets.device) < lengths.unsqueeze(1)
        tokens = targets[inside]
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= scores.shape[-1]):
            raise TaskError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}, but the model has {scores.shape[-1]}"
                " classes",
                where="task.target_key",
                hint="set the model's number of classes, task.pad_value, or renumber the tokens",
            )
        if tokens.numel() and bool((tokens == self.blank).any()):
            raise TaskError(
                "a target holds the blank",
                where="task.blank",
                value=self.blank,
                hint="give the blank a class of its own",
            )
        return scores, self._frames(scores, batch, input_lengths_key), targets.long(), lengths

    def _frames(self, scores: torch.Tensor, batch: Batch, key: Entry | None) -> torch.Tensor:
        if key is None:
            return torch.full((len(scores),), scores.shape[1], dtype=torch.long)
        lengths = tensor_entry(batch, key, where="task.input_lengths_key").long()
        if self.subsampling is not None:
            frames = torch.div(lengths + self.subsampling - 1, self.subsampling, rounding_mode="floor")
        else:
            args, kwargs = self.inputs(batch)
            padded = (args[0] if args else next(iter(kwargs.values()))).shape[self.time_axis]
            frames = torch.div(lengths * scores.shape[1] + padded - 1, padded, rounding_mode="floor")
        return frames.clamp(max=scores.shape[1])

    def _entries(self, batch: Batch) -> tuple[Entry, Entry | None, Entry | None]:
        if not isinstance(batch, Mapping):
            four = len(batch) == 4
            target: Entry = self.target_key if self.target_key is not None else (2 if four else len(batch) - 1)
            return (
                target,
                self.input_lengths_key if self.input_lengths_key is not None else (1 if four else None),
                self.target_lengths_key if self.target_lengths_key is not None else (3 if four else None),
            )
        target = target_entry(batch, self.target_key)
        of_target = self.target_lengths_key
        if of_target is None:
            of_target = next((key for key in ("target_lengths", f"{target}_lengths") if key in batch), None)
        of_input = self.input_lengths_key
        if of_input is None:
            of_input = next((key for key in ("input_lengths", "inputs_lengths") if key in batch), None)
        if of_input is None:
            others = [key for key in batch if str(key).endswith("_lengths") and key != of_target]
            of_input = others[0] if len(others) == 1 else None
        return target, of_input, of_target


def greedy_decode(scores: torch.Tensor, frames: torch.Tensor, *, blank: int) -> list[list[int]]:
    """Take the best class of each frame, merge repeats, drop blanks.

    Args:
        scores: Shape (batch, frames, classes).
        frames: How many frames of each sample count; shape (batch,).
        blank: Class of the blank.

    Returns:
        The tokens of each sample.
    """
    best = scores.argmax(-1).cpu()
    decoded: list[list[int]] = []
    for row, count in zip(best, frames.tolist(), strict=True):
        merged = torch.unique_consecutive(row[:count])
        decoded.append(merged[merged != blank].tolist())
    return decoded
