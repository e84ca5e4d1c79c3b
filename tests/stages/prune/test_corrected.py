"""Predicted latencies that measurements correct, by schedule and by every search, with measurements made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.graph.coupling import Counter, Coupling
from mil_cli.graph.model import Model
from mil_cli.stages import measured
from mil_cli.stages.measured import Choice, Correction
from mil_cli.stages.prune import amount
from mil_cli.stages.registry import config_type, function_of
from tests.stages.contexts import Kill, Notices, run_through_kills
from tests.stages.prune import blocks

SEARCHES: dict[str, dict[str, Any]] = {
    "magnitude": {"compare_samples": 0},
    "sensitivity": {"points": 2},
    "evolution": {"evaluations": 12, "population": 4},
    "netadapt": {"finetune_steps": 0, "reduction": 0.1},
}


class Wide(nn.Module):
    """A stream of 24 channels and blocks of 16, 32 and 24 inner ones: one channel is a small part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, stride=4)
        self.blocks = nn.ModuleList(blocks.Block(24, inner) for inner in (16, 32, 24))
        self.out = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.out(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = Model.capture(Wide().eval(), (torch.randn(2, 1, 8, 8),))
    return blocks.context().finetune(net, stage=None, name="all", trainer={"epochs": 8, "learning_rate": 0.2})


def pretend(monkeypatch: pytest.MonkeyPatch, error: float, *, of_what_is_left: bool = True) -> list[float]:
    """Let operations be the prediction, and what is measured be off by a factor; returns the ratios measured."""
    ratios: list[float] = []

    def ratio(cut: Model, original: Model, _: object) -> float:
        share = cut.macs() / original.macs()
        ratios.append(error * share if of_what_is_left else 1.0 - error * (1.0 - share))
        return ratios[-1]

    def counted(_: object, coupling: Coupling) -> Any:
        return Counter(coupling).macs

    monkeypatch.setattr(amount.Amount, "measure", counted)
    monkeypatch.setattr(amount.Amount, "prepare", lambda *_: None)
    monkeypatch.setattr(measured, "latency_ratio", ratio)
    return ratios


def run(method: str, model: Model, folder: Path | None = None, **changes: Any) -> tuple[Model, dict[str, Any]]:
    searched = {} if method == "magnitude" else {"search_samples": 256}
    settings = {"round_to": 1, "check_samples": 8, "recalibrate_samples": 64, **searched}
    config = config_type("prune", method).model_validate({**settings, "latency": 0.5, **SEARCHES[method], **changes})
    around = blocks.context(folder)
    return function_of(config)(model, config, around), around.notes


def _errors() -> list[Any]:
    """Return each method with each error; in the quick ones a method meets one that another does not."""
    errors = ((1.08, True), (0.92, False), (1.08, False), (0.92, True))
    return [
        pytest.param(method, *error, marks=() if kind == place % 2 else pytest.mark.slow)
        for place, method in enumerate(SEARCHES)
        for kind, error in enumerate(errors)
    ]


@pytest.mark.parametrize(("method", "error", "of_what_is_left"), _errors())
def test_what_is_found_keeps_the_target_when_it_is_measured(
    method: str, error: float, of_what_is_left: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = pretend(monkeypatch, error, of_what_is_left=of_what_is_left)
    result, notes = run(method, model)
    share = result.macs() / model.macs()
    true = error * share if of_what_is_left else 1.0 - error * (1.0 - share)
    assert (0.4 if method == "evolution" else 0.475) <= true <= 0.5  # evolution takes the better one, not the slower
    noted = notes["steps"][-1]["measured"] if method == "magnitude" else notes["measured"]
    assert noted == pytest.approx(true * notes["before"])
    assert 2 <= len(ratios) <= 4


@pytest.mark.parametrize(
    "method",
    [
        *("magnitude", "evolution"),
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("sensitivity", "netadapt")),
    ],
)
def test_where_it_is_not_wanted_nothing_is_measured(method: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = pretend(monkeypatch, 1.08)
    for changes in ({"measured": False}, {"multiple": "int8", "round_to": 1}):
        result, notes = run(method, model, **changes)
        assert 0.45 * model.macs() < result.macs() <= 0.5 * model.macs()
        assert "measured" not in notes
    assert ratios == []


@pytest.mark.slow
@pytest.mark.parametrize("method", list(SEARCHES))
def test_a_killed_run_decides_by_what_it_had_measured(
    method: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = pretend(monkeypatch, 1.08)
    whole, notes = run(method, model)
    asked = len(ratios)
    real, died = measured.latency_ratio, 0

    def dying(*args: Any) -> float:
        nonlocal died
        if len(ratios) == asked + 1 and not died:
            died = 1
            raise Kill
        return real(*args)

    monkeypatch.setattr(measured, "latency_ratio", dying)
    with pytest.raises(Kill):
        run(method, model, tmp_path)
    resumed, again = run(method, model, tmp_path)
    assert len(ratios) == 2 * asked  # what was kept was not measured again
    assert resumed.fingerprint() == whole.fingerprint()
    assert {**again, "latency_table": {}} == {**notes, "latency_table": {}}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in SEARCHES if name != "magnitude"])
def test_a_run_that_is_killed_as_it_saves_decides_alike(
    method: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 1.08)
    whole, _ = run(method, model)
    resumed = run_through_kills(lambda: run(method, model, tmp_path)[0], monkeypatch, saves=(3, 8, 9, 10, 11))
    assert resumed.fingerprint() == whole.fingerprint()


def correction(points: list[list[float]], monkeypatch: pytest.MonkeyPatch, slow: float) -> tuple[Correction, Notices]:
    """Return a correction whose models are their predicted seconds, and take `slow` times as long."""
    monkeypatch.setattr(measured, "latency_ratio", lambda model, original, _: slow * model / original)
    progress = Notices()
    around = blocks.context(progress=progress)
    made = Correction(
        1.0,  # type: ignore[arg-type]
        start=1.0,
        goal=0.5,
        context=around,
        measured=points,
        keep=lambda: None,
        active=True,
    )
    return made, progress


@pytest.mark.parametrize("step", [0.001, 0.01, 0.04])
@pytest.mark.parametrize("slow", [0.6, 0.92, 1.0, 1.08, 1.5])
def test_targets_are_scaled_until_the_goal_is_kept(slow: float, step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[list[float]] = []
    corrected, progress = correction(points, monkeypatch, slow)

    def find(target: float, before: int) -> Choice[float]:
        assert before <= len(points)
        share = int(target / step + 1e-9) * step
        return Choice(share, share, lambda: share, share)  # type: ignore[arg-type, return-value]

    share, seconds = corrected.search(find)
    assert seconds is not None
    assert seconds == pytest.approx(slow * share)
    assert 0.5 - slow * step - 0.02 <= seconds <= 0.5 + 1e-9
    assert not progress.told


def test_the_fastest_is_taken_where_nothing_keeps_the_goal_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    corrected, progress = correction([], monkeypatch, 1.5)

    def find(target: float, before: int) -> Choice[float]:
        share = max(target, 0.4)
        return Choice(share, share, lambda: share, share)  # type: ignore[arg-type, return-value]

    share, seconds = corrected.search(find)
    assert share == 0.4
    assert seconds == pytest.approx(0.6)
    assert progress.told == ["prune: measured, none of 2 choices keeps 500 ms; the fastest takes 600 ms"]


@pytest.mark.parametrize(("slow", "kept"), [(1.2, 0.4), (1.45, 0.2), (0.8, 0.6), (1.0, 0.4)])
def test_a_coarse_choice_that_misses_is_followed_by_a_smaller_one(
    slow: float, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five sizes the largest that keeps the goal when it is measured is found, however little a target moves."""
    corrected, progress = correction([], monkeypatch, slow)

    def find(target: float, before: int) -> Choice[float]:
        share = max(size for size in (0.2, 0.4, 0.6, 0.8, 1.0) if size <= max(target, 0.2))
        return Choice(share, share, lambda: share, share)  # type: ignore[arg-type, return-value]

    share, seconds = corrected.search(find)
    assert share == kept == max(size for size in (0.2, 0.4, 0.6, 0.8) if slow * size <= 0.5)
    assert seconds == pytest.approx(slow * kept)
    assert not progress.told


@pytest.mark.parametrize(("worths", "best"), [((0.9, 0.8), 0), ((0.8, 0.9), 1), ((0.9, 0.9), 0), ((None, None), 1)])
def test_of_choices_that_keep_the_goal_the_one_of_most_worth_is_taken(
    worths: tuple[float | None, float | None], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing says what they are worth the slowest is; of equal ones the fastest."""
    corrected, _ = correction([], monkeypatch, 0.8)
    sizes = (0.5, 0.6)

    def find(target: float, before: int) -> Choice[int]:
        place = min(before, 1)
        return Choice(place, sizes[place], lambda: sizes[place], place, worths[place])  # type: ignore[arg-type, return-value]

    found, seconds = corrected.search(find)
    assert found == best
    assert seconds == pytest.approx(0.8 * sizes[best])


def test_a_model_that_cannot_become_smaller_is_measured_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[list[float]] = []
    corrected, progress = correction(points, monkeypatch, 1.5)
    corrected.measure(0.7, 0.7)  # type: ignore[arg-type]
    for _ in range(2):
        corrected.conclude(0.4, 0.4)  # type: ignore[arg-type]
    assert points == [[0.7, pytest.approx(1.05)], [0.4, pytest.approx(0.6)]]
    assert progress.told == ["prune: measured, the smallest model does not keep 500 ms; the fastest takes 600 ms"] * 2
    assert corrected.seconds == pytest.approx(0.6)


def pretend_seconds(monkeypatch: pytest.MonkeyPatch, model: Model, whole: float) -> list[float]:
    """Let operators add up to a tenth of what a whole model takes; returns what was measured of whole models."""
    taken: list[float] = []

    class Lister:
        def __init__(self, counter: Counter) -> None:
            self.operators = lambda *cut: [0.1 * whole * counter.macs(*cut) / model.macs()]

    def seconds(measured: Model, _: object) -> float:
        taken.append(whole * (1 + len(taken)) * measured.macs() / model.macs())
        return taken[-1]

    def ratio(cut: Model, original: Model, _: object) -> float:
        return 1.08 * cut.macs() / original.macs()

    monkeypatch.setattr(amount.Amount, "_lister", lambda _, counter: Lister(counter))
    monkeypatch.setattr(amount.OperatorTable, "seconds", lambda _, operators: sum(operators))
    monkeypatch.setattr(amount.OperatorTable, "measure", lambda *_: None)
    monkeypatch.setattr(amount, "latency_seconds", seconds)
    monkeypatch.setattr(measured, "latency_ratio", ratio)
    return taken


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method == "evolution" else pytest.mark.slow) for method in SEARCHES]
)
def test_a_target_in_seconds_is_what_the_whole_model_takes(
    method: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine seems twice as slow after the interruption; what was measured before counts."""
    taken = pretend_seconds(monkeypatch, model, 0.02)
    real, asked = measured.latency_ratio, 0

    def dying(*args: Any) -> float:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Kill
        return real(*args)

    monkeypatch.setattr(measured, "latency_ratio", dying)
    with pytest.raises(Kill):
        run(method, model, tmp_path, latency="10 ms")
    result, notes = run(method, model, tmp_path, latency="10 ms")
    assert taken == [0.02]
    true = 0.02 * 1.08 * result.macs() / model.macs()
    assert (0.008 if method == "evolution" else 0.0095) <= true <= 0.01
    assert notes["before"] == pytest.approx(0.02)
    assert notes["target"] == pytest.approx(0.01)
    noted = notes["steps"][-1]["measured"] if method == "magnitude" else notes["measured"]
    assert noted == pytest.approx(true)


def test_a_model_that_is_fast_enough_by_its_own_seconds_is_left_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_seconds(monkeypatch, model, 0.02)
    result, _, told = adapted(model, latency="21 ms")
    assert result.macs() == model.macs()
    assert told == ["prune: the model has 20 ms, the target allows 21 ms: nothing is cut"]


def test_where_nothing_is_measured_seconds_are_those_of_predictions(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = pretend_seconds(monkeypatch, model, 0.02)
    result, notes = run("magnitude", model, latency="1 ms", measured=False)
    assert 0.45 * model.macs() < result.macs() <= 0.5 * model.macs()
    assert notes["before"] == pytest.approx(0.002)
    assert taken == []


def adapted(model: Model, **changes: Any) -> tuple[Model, dict[str, Any], list[str]]:
    settings = {"round_to": 1, "check_samples": 8, "recalibrate_samples": 64, "search_samples": 256, "latency": 0.5}
    chosen = config_type("prune", "netadapt").model_validate({**settings, **SEARCHES["netadapt"], **changes})
    progress = Notices()
    around = blocks.context(progress=progress)
    return function_of(chosen)(model, chosen, around), around.notes, progress.told


def test_netadapt_tells_what_its_result_takes_where_no_model_keeps_the_goal(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = pretend(monkeypatch, 1.6)
    result, notes, told = adapted(model, max_per_layer=0.35, max_per_chain=0)
    share = result.macs() / model.macs()
    assert share <= 0.5 < 1.6 * share
    assert ratios[-1] == pytest.approx(1.6 * share)
    assert notes["measured"] == pytest.approx(1.6 * share * notes["before"])
    assert len(told) == 1
    assert "the smallest model does not keep" in told[0]


def test_netadapt_ends_where_the_goal_holds_by_prediction_and_no_single_cut_saves_more(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is predicted stays at half from there on, though the smallest structure takes less."""
    pretend(monkeypatch, 1.08)
    half = 0.5 * model.macs()

    def stepped(_: object, coupling: Coupling) -> Any:
        macs = Counter(coupling).macs
        return lambda *cut: max(float(macs(*cut)), half if macs(*cut) > 0.15 * half else 0.15 * half)

    monkeypatch.setattr(amount.Amount, "measure", stepped)
    result, notes, told = adapted(model)
    assert notes["left"] == half >= result.macs()
    assert notes["measured"] == pytest.approx(1.08 * result.macs() / model.macs() * notes["before"])
    assert bool(told) == (notes["measured"] > half)


@pytest.mark.parametrize("slow", [0.6, 0.92, 1.0, 1.08, 1.5])
def test_what_shrinks_bit_by_bit_stops_where_the_goal_is_kept(slow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    corrected, progress = correction([], monkeypatch, slow)
    left = 1.0
    while (stop := corrected.next_stop()) is not None:
        assert stop < left
        left = stop
        corrected.measure(left, left)  # type: ignore[arg-type]
    seconds = corrected.seconds
    assert seconds is not None
    assert seconds == pytest.approx(slow * left)
    assert (0.475 if slow > 0.7 else 0.4) < seconds <= 0.5
    assert not progress.told
