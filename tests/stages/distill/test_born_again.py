"""Generations: the same as single trainings one after the other, which is kept, the same end after kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.distill.born_again import BornAgainConfig, born_again, mean_of_weights
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_labels
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from tests.stages.contexts import run_through_kills
from tests.stages.distill.planes import context_of, net, trained

SHORT: dict[str, Any] = {"trainer": {"epochs": 2}}


def _qualities(context: Context) -> Any:
    generations: Any = context.notes["generations"]
    return generations


def _convergence(context: Context) -> Any:
    convergence: Any = context.notes["convergence"]
    return convergence


def _by_hand(generations: int) -> list[Model]:
    models = [supervised(net(6), SupervisedConfig(**SHORT), context_of())]
    single = SoftLabelsConfig(temperature=1.0, weight=0.5, **SHORT)
    for _ in range(generations):
        models.append(soft_labels(net(6), single, context_of(original=models[-1])))
    return models


def test_generations_are_single_trainings_from_the_same_start() -> None:
    models = _by_hand(2)
    context = context_of()
    last = born_again(net(6), BornAgainConfig(final="last", **SHORT), context)
    assert last.fingerprint() == models[-1].fingerprint()
    values = [context.evaluate(model).value for model in models]
    assert _qualities(context) == {"kept": 2, "qualities": values}
    best = born_again(net(6), BornAgainConfig(**SHORT), context)
    assert best.fingerprint() == models[values.index(max(values))].fingerprint()
    assert max(values) > context.evaluate(net(6)).value + 0.2


def test_the_mean_is_kept_only_if_it_is_better() -> None:
    context = context_of()
    result = born_again(net(6), BornAgainConfig(final="mean", **SHORT), context)
    facts = _qualities(context)
    best = max(facts["qualities"])
    assert context.evaluate(result).value == max(best, facts["quality_of_the_mean"])
    assert (facts["kept"] == "mean") == (facts["quality_of_the_mean"] > best)


def test_the_mean_is_taken_weight_by_weight() -> None:
    models = [net(6), net(6)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(2.0)
    before = models[0].state_dict()
    for name, value in mean_of_weights(models).state_dict().items():
        moved = name in dict(models[0].named_parameters())
        torch.testing.assert_close(value, before[name] + 1.0 if moved else before[name])


def test_the_plain_training_beside_is_the_first_generation(tmp_path: Path) -> None:
    context = context_of(workspace=tmp_path)
    born_again(net(6), BornAgainConfig(beside_plain=True, **SHORT), context)
    assert _convergence(context)["plain"][-1][1] == _qualities(context)["qualities"][0]


@pytest.mark.slow
@pytest.mark.parametrize("final", ["best", "last"])
def test_beside_plain_training_all_that_had_to_be_trained_counts(final: Any, tmp_path: Path) -> None:
    for name, start in (("new", net(6)), ("trained", trained())):
        context = context_of(workspace=tmp_path / name)
        born_again(start, BornAgainConfig(final=final, beside_plain=True, **SHORT), context)
        facts, generations = _convergence(context), _qualities(context)
        number = generations["kept"]
        assert [steps for steps, _ in facts["distilled"]] == [20 * number + 10, 20 * number + 20]
        assert facts["distilled"][-1][1] == generations["qualities"][number]
        assert number or facts["distilled"] == facts["plain"]
        assert facts["seconds"] > facts["plain_seconds"]  # the first generation is the plain training


def test_a_mean_that_is_kept_has_one_point_after_all_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mil_cli.stages.distill.born_again.mean_of_weights", lambda models: trained())
    context = context_of()
    result = born_again(
        net(6), BornAgainConfig(final="mean", beside_plain=True, recalibrate_samples=0, **SHORT), context
    )
    assert result.fingerprint() == trained().fingerprint()
    assert _convergence(context)["distilled"] == [[60, _qualities(context)["quality_of_the_mean"]]]


@pytest.mark.slow
def test_killed_generations_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workspace: Path) -> Model:
        config = BornAgainConfig(final="last", trainer={"epochs": 1})
        return born_again(net(6), config, context_of(workspace=workspace))

    whole = run(tmp_path / "whole")
    # Ten saves for each of the three trainings.
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={4, 12, 20, 27})
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    "content", [{"generations": 0}, {"final": "first"}, {"weight": -1}, {"temperature": 0}, {"teacher": "a.pt2"}]
)
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BornAgainConfig.model_validate(content)
