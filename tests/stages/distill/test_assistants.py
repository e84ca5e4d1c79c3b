"""Assistants: sizes and budgets against brute force, who teaches whom, what is refused, the same end after kills."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.distill.assistants import AssistantsConfig, assistants, share_budget
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_labels
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.train.supervised import SupervisedConfig
from tests.stages.contexts import run_through_kills
from tests.stages.distill.planes import context_of, divergence, net, trained

PRUNE = MagnitudeConfig.model_validate(
    {"params": 0.5, "round_to": 1, "max_per_layer": 0.95, "recover": "train", "recover_last": True}
)
STAGES = {"prune": PRUNE, "train": SupervisedConfig()}


def _context(**changes: Any) -> Context:
    return context_of(stages=STAGES, **changes)


def _config(**changes: Any) -> AssistantsConfig:
    return AssistantsConfig.model_validate({"by": "prune", "budget": "full", **changes})


@pytest.mark.parametrize("macs", [[192, 32], [192, 80, 32], [1000, 500, 200, 100], [10, 9, 8]])
@pytest.mark.parametrize("epochs", [1, 7, 60])
def test_a_shared_budget_is_the_best_that_fits(macs: list[int], epochs: int) -> None:
    def cost(shares: tuple[int, ...]) -> int:
        return sum(
            share * (before + 3 * after)
            for share, (before, after) in zip(shares, itertools.pairwise(macs), strict=True)
        )

    direct = epochs * (macs[0] + 3 * macs[-1])
    shares = tuple(share_budget(epochs, macs))
    learners = len(macs) - 1
    fitting = [
        (each,) * (learners - 1) + (each + more,)
        for each in range(1, epochs + 1)
        for more in range(epochs + 1)
        if cost((each,) * (learners - 1) + (each + more,)) <= direct
    ]
    assert shares == max(fitting, default=(0,) * learners)


def test_sizes_lie_in_equal_ratios_and_each_learns_from_the_one_before() -> None:
    student, context = net(3), _context()
    learned = assistants(student, _config(count=2), context)
    facts: Any = context.notes["assistants"]
    sizes = [trained().macs(), *(fact["macs"] for fact in facts), student.macs()]
    assert context.notes["teacher_macs"] == sizes[0]
    ratio = (sizes[-1] / sizes[0]) ** (1 / 3)
    # A hidden unit more or less is 8 operations.
    assert sizes[1] == pytest.approx(sizes[0] * ratio, abs=8)
    assert sizes[2] == pytest.approx(sizes[0] * ratio**2, abs=8)
    assert all(fact["quality"] > 0.8 for fact in facts)
    assert divergence(learned, trained()) < 0.6 * divergence(student, trained())
    assert "widths" not in context.notes
    history: Any = context.notes["history"]
    assert len(history) == 4


def test_the_target_of_the_stage_that_cuts_does_not_matter() -> None:
    cut = PRUNE.model_copy(update={"params": None, "memory": 0.5, "recover": None})
    learned = assistants(net(3), _config(), context_of(stages={"prune": cut}))
    assert learned.fingerprint() == assistants(net(3), _config(), _context()).fingerprint()


def test_given_assistants_make_the_chain_of_single_distillations() -> None:
    student, middle = net(3), net(10)
    config = _config(by=None, assistants=["middle.pt2"], temperature=2.0, weight=0.7)
    learned = assistants(student, config, _context(load_source={"middle.pt2": middle}.__getitem__))
    single = SoftLabelsConfig(temperature=2.0, weight=0.7)
    taught_middle = soft_labels(middle, single, _context())
    by_hand = soft_labels(student, single, _context(original=taught_middle))
    assert learned.fingerprint() == by_hand.fingerprint()


def test_an_equal_budget_costs_no_more_than_direct_distillation() -> None:
    context = _context()
    assistants(net(3), _config(budget="equal", trainer={"epochs": 9}), context)
    facts: Any = [*context.notes["assistants"], context.notes["student"]]  # type: ignore[misc]
    assert 0.7 < sum(fact["share_of_direct"] for fact in facts) <= 1
    history: Any = context.notes["history"]
    assert len(history) == facts[-1]["epochs"] < 9


@pytest.mark.slow
def test_beside_plain_training_the_assistants_steps_count() -> None:
    context = _context()
    assistants(net(3), _config(count=2, beside_plain=True), context)
    history: Any = context.notes["history"]
    facts: Any = context.notes["convergence"]
    # Two assistants of four epochs of ten steps.
    assert facts["distilled"] == [[80 + entry["steps"], entry["val"]] for entry in history]
    assert [steps for steps, _ in facts["plain"]] == [10, 20, 30, 40]


def test_a_foreign_student_takes_the_models_place() -> None:
    context = _context(load_source={"student.pt2": net(4)}.__getitem__)
    learned = assistants(net(12), _config(student="student.pt2"), context)
    assert learned.num_params() == net(4).num_params()
    (fact,) = context.notes["assistants"]  # type: ignore[misc]
    assert net(4).macs() < fact["macs"] < trained().macs()


def test_fine_tuning_by_it_learns_from_the_teacher_itself() -> None:
    stages = {**STAGES, "recover": _config(trainer={"epochs": 2})}
    learned = context_of(stages=stages).finetune(net(6), stage="recover", name="round")
    direct = soft_labels(net(6), SoftLabelsConfig(trainer={"epochs": 2}), context_of())
    assert learned.fingerprint() == direct.fingerprint()


@pytest.mark.parametrize(
    ("config", "student", "words"),
    [
        (_config(), 24, "soft_labels"),
        (_config(by="train"), 3, "does not prune"),
        (_config(by="prun"), 3, "no stage 'prun'"),
        (_config(count=10), 20, "count"),
        (_config(by=None, assistants=["middle.pt2"]), 12, "largest to the smallest"),
        (_config(budget="equal", trainer={"epochs": 1}), 3, "budget: full"),
    ],
)
def test_what_cannot_be_is_told(config: AssistantsConfig, student: int, words: str) -> None:
    context = _context(load_source={"middle.pt2": net(10)}.__getitem__)
    with pytest.raises(StageError, match=words):
        assistants(net(student), config, context)


@pytest.mark.slow
def test_a_killed_chain_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workspace: Path) -> Model:
        return assistants(net(3), _config(count=2, trainer={"epochs": 1}), _context(workspace=workspace))

    whole = run(tmp_path / "whole")
    # Ten saves for each of the three trainings, one for each cut.
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={1, 6, 15, 22, 30})
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    "content",
    [{"by": None}, {"assistants": ["a.pt2"]}, {"count": 0}, {"budget": "half"}, {"temperature": 0}, {"weight": 2}],
)
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _config(**content)
