"""CTC against brute force over all alignments, and error rates against an own edit distance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from mil_cli.data.collate import pad_collate
from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.ctc import Ctc, greedy_decode


def _collapse(path: tuple[int, ...], blank: int = 0) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != blank]


def _edits(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def test_loss_sums_over_all_alignments() -> None:
    scores = torch.randn(1, 4, 3, dtype=torch.float64)
    target = [1, 2]
    probabilities = functional.softmax(scores[0], -1)
    total = sum(
        math.prod(float(probabilities[frame, token]) for frame, token in enumerate(path))
        for path in itertools.product(range(3), repeat=4)
        if _collapse(path) == target
    )
    loss = Ctc().loss(scores, (torch.zeros(1, 4, 1), torch.tensor([target])))
    assert float(loss) == pytest.approx(-math.log(total) / 2, rel=1e-5)


def test_padding_changes_nothing() -> None:
    task = Ctc()
    assert isinstance(task, Task)
    generator = torch.Generator().manual_seed(1)
    samples = [
        (torch.randn(length, 2, generator=generator), torch.randint(1, 4, (tokens,), generator=generator))
        for length, tokens in ((8, 3), (5, 2), (6, 1))
    ]
    scores = [torch.randn(len(x), 4, generator=generator) for x, _ in samples]
    batch = pad_collate(samples)
    padded = torch.full((3, 8, 4), 7.0)
    for row, value in zip(padded, scores, strict=True):
        row[: len(value)] = value
    single = [task.loss(s[None], pad_collate([sample])) for s, sample in zip(scores, samples, strict=True)]
    torch.testing.assert_close(task.loss(padded, batch), torch.stack(single).mean())
    assert task.inputs(batch)[0][0] is batch[0]  # type: ignore[index]
    other = torch.randn_like(padded)
    changed = padded.clone()
    changed[1, 5:] = -3.0
    torch.testing.assert_close(
        task.distance(changed, other, batch, temperature=2.0), task.distance(padded, other, batch, temperature=2.0)
    )


def test_token_error_rate_equals_edit_distance() -> None:
    task = Ctc()
    metric = task.metric()
    generator = torch.Generator().manual_seed(2)
    errors = length = 0
    for _ in range(3):
        scores = torch.randn(2, 7, 5, generator=generator)
        targets = [torch.randint(1, 5, (4,), generator=generator), torch.randint(1, 5, (2,), generator=generator)]
        batch = {
            "audio": torch.zeros(2, 14, 1),
            "audio_lengths": torch.tensor([14, 9]),
            "labels": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100),
            "labels_lengths": torch.tensor([4, 2]),
        }
        task.update(metric, scores, batch)
        for row, frames, target in zip(scores, (7, 5), targets, strict=True):
            errors += _edits(_collapse(tuple(row.argmax(-1)[:frames].tolist())), target.tolist())
            length += len(target)
    assert float(metric.compute()) == pytest.approx(errors / length)
    assert not task.higher_is_better
    assert set(task.inputs(batch)[1]) == {"audio"}


def test_word_error_rate_counts_words() -> None:
    task = Ctc(unit="word", word_separator=9)
    metric = task.metric()
    path = torch.tensor([1, 0, 1, 9, 2, 9, 3])  # words 1-1, 2, 3
    scores = functional.one_hot(path, 10).float()[None] * 5
    task.update(metric, scores, (torch.zeros(1, 7, 1), torch.tensor([[1, 1, 9, 2, 2, 9, 3]])))
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_greedy_decoding_merges_then_drops_blanks() -> None:
    scores = functional.one_hot(torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3]]), 4).float()
    assert greedy_decode(scores, torch.tensor([7]), blank=0) == [[1, 1, 2]]
    assert greedy_decode(scores, torch.tensor([0]), blank=0) == [[]]


@pytest.mark.parametrize(
    ("scores", "targets", "words"),
    [
        (torch.randn(1, 4, 3), torch.tensor([[1, 5]]), "tokens run from 1 to 5"),
        (torch.randn(1, 4, 3), torch.tensor([[1, 0]]), "holds the blank"),
        (torch.randn(1, 4, 3), torch.tensor([[1.0]]), "integer tokens"),
        (torch.randn(4, 3), torch.tensor([[1]]), "three axes"),
    ],
)
def test_what_does_not_fit_is_told(scores: torch.Tensor, targets: torch.Tensor, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        Ctc().loss(scores, (torch.zeros(1, 4, 1), targets))


@pytest.mark.parametrize("length", [-1, 3])
def test_lengths_beyond_the_targets_are_told(length: int) -> None:
    batch = torch.zeros(1, 4, 1), torch.tensor([4]), torch.tensor([[1, 2]]), torch.tensor([length])
    with pytest.raises(TaskError, match="padded to 2"):
        Ctc().loss(torch.randn(1, 4, 3), batch)


def test_the_blank_must_be_a_class() -> None:
    with pytest.raises(TaskError, match=r"0 to 2.*task\.blank|task\.blank.*0 to 2"):
        Ctc(blank=3).loss(torch.randn(1, 4, 3), (torch.zeros(1, 4, 1), torch.tensor([[1, 2]])))
    with pytest.raises(TaskError, match="at least 0"):
        Ctc(blank=-1)


def test_words_need_a_separator() -> None:
    with pytest.raises(TaskError, match="word_separator"):
        Ctc(unit="word")
