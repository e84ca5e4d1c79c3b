"""Function matching: samples mixed as drawn, labels unread, the same end after kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.distill.function_matching import FunctionMatchingConfig, function_matching, matching_objective, mix
from mil_cli.task.classification import Classification
from tests.stages.contexts import run_through_kills
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import batch_of, context_of, divergence, net, planes, trained


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_sample_lies_between_itself_and_one_other() -> None:
    """The one-hot rows of an identity show partner and share of each sample."""
    x, numbers = torch.eye(64), torch.arange(64)
    mixed: Any = mix({"x": x, "y": 10 * x.unsqueeze(1), "number": numbers}, _generator(), concentration=1.0)
    torch.testing.assert_close(mixed["x"].sum(1), torch.ones(64))
    assert int(((mixed["x"] > 0).sum(1) > 2).sum()) == 0
    assert torch.equal(mixed["number"], numbers)
    torch.testing.assert_close(mixed["y"], 10 * mixed["x"].unsqueeze(1))  # all entries by the same share and partner
    partners = torch.where(mixed["x"].diag() < 1, (mixed["x"] - torch.diag(mixed["x"].diag())).argmax(1), numbers)
    assert sorted(partners.tolist()) == list(range(64))
    assert torch.equal(x, torch.eye(64))


@pytest.mark.parametrize("concentration", [0.3, 1.0])
def test_shares_are_drawn_from_beta(concentration: float) -> None:
    x = torch.arange(4000.0) + 1
    shares = []
    for seed in range(3):
        (mixed,) = mix((torch.stack([x, x**2], 1),), _generator(seed), concentration=concentration)
        (partners,) = mix((torch.arange(4000.0),), _generator(seed), concentration=concentration)
        assert len(partners) == 4000
        order = torch.randperm(4000, generator=_generator(seed))
        shares.append(((mixed[:, 0] - x[order]) / (x - x[order]))[order != torch.arange(4000)])
    drawn = torch.cat(shares).double()
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=0.05)


def test_the_objective_is_the_divergence_at_the_same_view() -> None:
    x, _ = batch_of(9)
    outputs = torch.randn(9, 3)
    loss = matching_objective(lesson_of(trained()), FunctionMatchingConfig())(outputs, (x, torch.zeros(9)))
    with torch.no_grad():
        targets = functional.softmax(trained()(x), 1)
    expected = functional.kl_div(functional.log_softmax(outputs, 1), targets, reduction="batchmean")
    torch.testing.assert_close(loss, expected)


def test_labels_are_not_read_and_the_student_comes_nearer() -> None:
    student = net(6)
    context = context_of()
    learned = function_matching(student, FunctionMatchingConfig(longer=2), context)
    assert divergence(learned, trained()) < 0.3 * divergence(student, trained())
    history: Any = context.notes["history"]
    assert len(history) == 8
    assert context.notes["teacher_outputs_kept"] is False
    x, labels = next(iter(planes().train.batches(200)))  # type: ignore[misc]
    other = Data(name="other", train=TensorSplit((x, 2 - labels)), val=planes().val, test=planes().test)
    again = function_matching(student, FunctionMatchingConfig(longer=2), context_of(data=other))
    assert again.fingerprint() == learned.fingerprint()


@pytest.mark.slow
def test_a_killed_training_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workspace: Path) -> Model:
        return function_matching(net(6), FunctionMatchingConfig(longer=0.5), context_of(workspace=workspace))

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={3, 13})
    assert killed.fingerprint() == whole.fingerprint()


def test_tokens_cannot_be_mixed() -> None:
    tokens = TensorSplit((torch.zeros(40, 5, dtype=torch.long), torch.zeros(40, dtype=torch.long)))
    data = Data(name="tokens", train=tokens, val=tokens, test=tokens)
    with pytest.raises(StageError, match="soft_labels"):
        function_matching(net(6), FunctionMatchingConfig(), context_of(data=data, task=Classification()))


@pytest.mark.parametrize("content", [{"temperature": 0}, {"mixup": 0}, {"longer": 0}, {"weight": 0.5}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FunctionMatchingConfig.model_validate(content)
