"""NetAdapt: its greedy choices against ones worked out by hand, targets, depth, kills, bad settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Counter, analyse
from mil_cli.graph.model import Model
from mil_cli.graph.residual import residual_chains
from mil_cli.stages.context import Context
from mil_cli.stages.prune import netadapt as method
from mil_cli.stages.prune.netadapt import NetadaptConfig, netadapt
from mil_cli.stages.prune.searching import Search
from tests.stages.contexts import run_through_kills
from tests.stages.prune import blocks

WORTHS = {f"blocks.{number}.first.weight": worth for number, worth in enumerate((1.0, 9.0, 3.0))}
"""By the weight that makes them: what a channel is worth, in place of a quality; one of the stem is worth nothing."""


@pytest.fixture(scope="module")
def model() -> Model:
    return blocks.trained()


def config(**changes: Any) -> NetadaptConfig:
    return NetadaptConfig.model_validate(blocks.settings(**{"finetune_steps": 2, **changes}))


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def worth(model: Model) -> float:
    """Return a quality that only shapes decide."""
    found = shapes(model)
    return sum(value * found[name][0] for name, value in WORTHS.items() if name in found)


@pytest.mark.parametrize("judge", ["loss", "quality"])
def test_each_iteration_keeps_the_best_of_the_least_sufficient_cuts(
    judge: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same greedy search, written out over `Counter` for one space or branch at a time."""
    monkeypatch.setattr(Search, "quality", lambda self, model: worth(model))
    monkeypatch.setattr(method, "mean_loss", lambda model, *_, **__: 50.0 - worth(model))
    around = blocks.context()
    settings = config(macs=0.5, judge=judge, finetune_steps=0, reduction=0.2, decay=0.9, max_per_layer=0.7)
    result = netadapt(model, settings, around)

    coupling, start = analyse(model), model.macs()
    counter = Counter(coupling)
    spaces = {space.origin: number for number, space in enumerate(coupling.spaces) if space.free}
    (chain,) = residual_chains(coupling.graph)
    branches = {f"blocks.{number}.first.weight": branch for number, branch in enumerate(chain)}
    removed, gone, bound, step = dict.fromkeys(spaces, 0), [], start, 0.2 * start

    def cost(changed: dict[str, int], without: list[str]) -> int:
        classes = {spaces[name]: set(range(count)) for name, count in changed.items()}
        dropped = frozenset[str]().union(*(branches[name].nodes for name in without))
        return counter.macs(classes, dropped)

    def total(changed: dict[str, int], without: list[str]) -> float:
        return sum(
            value * (coupling.spaces[spaces[name]].size - changed[name])
            for name, value in WORTHS.items()
            if name not in without
        )

    def score(changed: dict[str, int], without: list[str]) -> float:
        if judge == "quality":
            return total(changed, without)
        return (total(changed, without) - total(removed, gone)) / (bound - cost(changed, without))

    chosen = []
    while bound > 0.5 * start:
        target, options = max(0.5 * start, bound - step), []
        for name, number in spaces.items():
            size = coupling.spaces[number].size
            for count in range(removed[name] + 1, int(size * 0.7) + 1):
                option = {**removed, name: count}
                if name not in gone and cost(option, gone) <= target:
                    options.append((score(option, gone), name, option, gone))
                    break
        for name, branch in branches.items():
            if name not in gone and len(gone) < 2 and cost(removed, [*gone, name]) <= target:
                options.append((score(removed, [*gone, name]), branch.addition, removed, [*gone, name]))
        if not options:
            step /= 2
            continue
        best = max(option[0] for option in options)
        _, name, removed, gone = next(option for option in options if option[0] == best)
        chosen.append(name)
        bound, step = cost(removed, gone), 0.2 * start * 0.9 ** len(chosen)
    iterations = around.notes["iterations"]
    assert isinstance(iterations, list)
    assert [entry["chosen"] for entry in iterations] == chosen
    assert result.macs() == bound == around.notes["left"]


@pytest.mark.slow
def test_short_training_is_part_of_the_choice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[dict[str, Any]] = []
    real = type(blocks.context()).finetune

    def watched(self: Any, model: Model, **given: Any) -> Model:
        trained.append(given)
        return real(self, model, **given)

    monkeypatch.setattr(type(blocks.context()), "finetune", watched)
    around = blocks.context()
    netadapt(model, config(macs=0.6, reduction=0.3, finetune="recover", recover="recover"), around)
    *proposals, last = trained
    iterations = around.notes["iterations"]
    assert isinstance(iterations, list)
    assert len(proposals) == sum(len(entry["proposals"]) for entry in iterations)
    assert all(given["steps"] == 2 and given["stage"] == "recover" for given in proposals)
    assert last["name"] == "result"
    assert len(around.notes["history"]) == 1  # type: ignore[arg-type]
    for entry in iterations:
        uncut, *others = entry["proposals"]
        assert uncut["name"] == ""
        free = {one["name"]: one["left"] for one in others if one["loss"] <= uncut["loss"]}
        growth = {one["name"]: (one["loss"] - uncut["loss"]) / (uncut["left"] - one["left"]) for one in others}
        best = min(free, key=free.__getitem__) if free else min(growth, key=growth.__getitem__)
        assert entry["chosen"] == best


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_of_cuts_that_cost_nothing_the_one_that_saves_most_is_kept(
    gain: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.macs()
    monkeypatch.setattr(method, "mean_loss", lambda model, *_, **__: 1.0 - gain * (model.macs() < whole))
    around = blocks.context()
    netadapt(model, config(macs=0.8, finetune_steps=0, reduction=0.1), around)
    iterations = around.notes["iterations"]
    assert isinstance(iterations, list)
    _, *others = iterations[0]["proposals"]
    left = {one["name"]: one["left"] for one in others}
    assert len(set(left.values())) > 1
    assert iterations[0]["chosen"] == min(left, key=left.__getitem__)


def test_a_loss_that_is_not_finite_is_never_chosen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    around = blocks.context()
    monkeypatch.setattr(method, "mean_loss", lambda model, *_, **__: math.inf if worth(model) < 90 else 1.0)
    netadapt(model, config(macs=0.8, finetune_steps=0, reduction=0.1), around)
    iterations = around.notes["iterations"]
    assert isinstance(iterations, list)
    for entry in iterations:
        _, *others = entry["proposals"]
        losses = {one["name"]: one["loss"] for one in others}
        assert losses[entry["chosen"]] == 1.0 or set(losses.values()) == {None}


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_the_target_is_met_and_the_proof_holds(model: Model, quantity: str) -> None:
    around = blocks.context()
    result = netadapt(model, config(**{quantity: 0.5, "reduction": 0.25}), around)
    left, whole = (result.macs(), model.macs()) if quantity == "macs" else (result.num_params(), model.num_params())
    assert around.notes["left"] == left <= 0.5 * whole
    iterations = around.notes["iterations"]
    assert isinstance(iterations, list)
    assert all(entry["check"]["difference"] < 1e-5 for entry in iterations)
    ends = {branch.addition for chain in residual_chains(analyse(result).graph) for branch in chain}
    gone = around.notes["left_out"]
    assert isinstance(gone, list)
    assert not ends & set(gone)
    assert len(ends) == 3 - len(gone)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"checkpoint_every_seconds": 0, "learning_rate": 0.05}
    settings = config(macs=0.5, reduction=0.25, trainer=trainer, finetune_steps=3)
    around = blocks.context(tmp_path / "whole")
    whole = netadapt(model, settings, around)
    again: list[Context] = []

    def run() -> Model:
        again.append(blocks.context(tmp_path / "killed"))
        return netadapt(model, settings, again[-1])

    resumed = run_through_kills(run, monkeypatch, saves=(2, 7, 12, 20))
    assert resumed.fingerprint() == whole.fingerprint()
    assert again[-1].notes["iterations"] == around.notes["iterations"]
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["iterations.ckpt"]


def test_settings_that_lead_nowhere_are_refused(model: Model) -> None:
    with pytest.raises(StageError, match=r"all iterations together save at most 40%.*asks for 70%") as caught:
        netadapt(model, config(macs=0.3, reduction=0.2, decay=0.5), blocks.context())
    assert caught.value.where == "stages.prune.reduction"
    with pytest.raises(StageError, match="the smallest that can be kept"):
        netadapt(model, config(macs=0.001), blocks.context())
    with pytest.raises(StageError, match="no stage 'nothing'"):
        netadapt(model, config(macs=0.5, finetune="nothing"), blocks.context())
    for wrong in ({"decay": 0}, {"reduction": 1}, {"importance": "luck"}, {"steps": 3}, {"macs": 2.5}):
        with pytest.raises(ValidationError):
            config(**{"macs": 0.5, **wrong})
