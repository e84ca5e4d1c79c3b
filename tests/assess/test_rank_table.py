"""Rankings of tables: the order, its intervals, recommendations, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from pydantic import ValidationError

from mil_cli.assess.active import Acquisition
from mil_cli.assess.columns import Columns
from mil_cli.assess.costs import Clocks
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.rank_intervals import rank_intervals
from mil_cli.assess.rank_table import rank_table
from mil_cli.assess.selection import RankConfig, as_json
from mil_cli.assess.table import Table, table_of
from mil_cli.errors import DataError
from mil_cli.events import Bar, SilentProgress

Floats = np.ndarray
CONFIG = RankConfig(predictor=Ridge(target="value"), repeats=2, refits=10, draws=100, next=Acquisition(batch=3))


def made(seed: int, *, architectures: int = 60, trained: int = 30, noise: float = 0.3) -> tuple[Table, Floats]:
    """Return a table of which some are trained, and the quality of all."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(architectures, 3))
    quality = features @ [1.0, 0.7, 0.0] + noise * generator.normal(size=architectures)
    records = [
        {
            "id": f"net{row}",
            **dict(zip("abc", features[row], strict=True)),
            "score": -quality[row] + generator.normal(),
            "quality": quality[row] if row < trained else None,
        }
        for row in range(architectures)
    ]
    columns = Columns(features=("a", "b", "c"), scores=("score",))
    return table_of([(record["id"], record) for record in records], columns), quality


def test_trained_ones_have_their_quality_and_others_a_prediction() -> None:
    table, quality = made(0)
    ranking = rank_table(table, CONFIG)
    assert [entry.rank for entry in ranking.entries] == [*range(1, 61)]
    for entry in ranking.entries:
        row = int(entry.id.removeprefix("net"))
        assert entry.source == ("trained" if row < 30 else "predicted")
        assert entry.quality == pytest.approx(quality[row], abs=1e-12 if row < 30 else 1.5)
        assert entry.rank_low <= entry.rank <= entry.rank_high
    found = [entry.quality for entry in ranking.entries]
    assert found == sorted(found, reverse=True)
    assert ranking.tau.value > 0.6
    assert ranking.single["score"].value < -0.2  # the sign is kept


@pytest.mark.parametrize("target", ["rank", "value"])
def test_ranks_are_in_their_intervals_as_often_as_said(target: str) -> None:
    held, widths = [], []
    config = CONFIG.model_copy(update={"predictor": Ridge(target=target)})
    for seed in range(8):
        table, quality = made(seed)
        ranks = np.empty(60)
        ranks[np.argsort(-quality)] = np.arange(1, 61)
        for entry in rank_table(table, config).entries:
            if entry.source == "predicted":
                held.append(entry.rank_low <= ranks[int(entry.id.removeprefix("net"))] <= entry.rank_high)
                widths.append(entry.rank_high - entry.rank_low)
    assert 0.8 < np.mean(held) < 0.97
    assert np.mean(widths) < 24


def test_ranks_and_recommendations_do_not_depend_on_the_scale_of_the_quality() -> None:
    """Bad trainings that lie far below the others neither widen intervals nor are asked for."""
    table, _ = made(0)
    bent = Table(table.ids, table.columns, table.inputs, -np.exp(-4 * table.quality), table.trainings, {}, table.rows)
    config = CONFIG.model_copy(update={"predictor": Ridge(), "noise": 0.0})
    np.testing.assert_array_equal(
        rank_intervals(table, config, SilentProgress()), rank_intervals(bent, config, SilentProgress())
    )
    straight, other = ([entry.id for entry in rank_table(each, config).recommended] for each in (table, bent))
    assert straight == other


def test_noise_between_seeds_widens_what_is_known_of_trained_ones() -> None:
    table, _ = made(0, trained=60)
    sure, unsure = (rank_table(table, CONFIG.model_copy(update={"noise": noise})) for noise in (0.0, 0.2))
    assert all(entry.rank_low == entry.rank_high for entry in sure.entries)
    assert sum(entry.rank_high - entry.rank_low for entry in unsure.entries) > 60
    entry = unsure.entries[0]
    assert entry.high - entry.quality == pytest.approx(1.645 * 0.2, abs=1e-3)
    assert sure.recommended == unsure.recommended == []


def test_less_may_be_better() -> None:
    table, _ = made(0)
    turned = Table(
        ids=table.ids,
        columns=table.columns.model_copy(update={"higher_is_better": False}),
        inputs=table.inputs,
        quality=-table.quality,
        trainings=table.trainings,
        seconds={},
        rows=table.rows,
    )
    up, down = rank_table(table, CONFIG), rank_table(turned, CONFIG)
    assert [entry.id for entry in up.entries] == [entry.id for entry in down.entries]
    assert up.recommended[0].id == down.recommended[0].id
    for entry, other in zip(up.entries, down.entries, strict=True):
        assert other.quality == pytest.approx(-entry.quality)
        assert (other.low, other.high) == pytest.approx((-entry.high, -entry.low))


def test_collapsed_trainings_come_last_and_are_not_asked_for_again() -> None:
    table, _ = made(0)
    quality = table.quality.copy()
    quality[:2] = np.nan
    collapsed = Table(table.ids, table.columns, table.inputs, quality, table.trainings, {}, table.rows)
    ranking = rank_table(collapsed, CONFIG.model_copy(update={"next": Acquisition(batch=50)}))
    assert {entry.id for entry in ranking.entries[-2:]} == {"net0", "net1"}
    for entry in ranking.entries[-2:]:
        assert (entry.source, entry.rank, entry.quality, entry.next) == ("collapsed", 59, None, None)
    assert {entry.id for entry in ranking.recommended} == {f"net{row}" for row in range(30, 60)}


def test_programs_get_json_without_nan_and_the_same_each_time() -> None:
    table, _ = made(0)
    inputs = table.inputs.copy()
    inputs[40, 3], inputs[2, 3] = np.nan, np.inf
    odd = Table(table.ids, table.columns, inputs, table.quality, table.trainings, {}, table.rows)

    def content() -> str:
        ticks = count()
        clocks = Clocks(cpu=lambda: float(next(ticks)), wall=lambda: 10.0 * next(ticks))
        ranking = rank_table(odd, CONFIG.model_copy(update={"curve": (5, 15)}), clocks=clocks)
        return json.dumps(as_json(ranking), allow_nan=False)

    text = content()
    assert text == content()
    found = json.loads(text)
    assert found["version"] == 1
    assert found["settings"]["predictor"]["method"] == "ridge"
    assert len(found["architectures"]) == 60
    assert len(found["train_next"]) == 3
    assert [point["trained"] for point in found["curve"]] == [5, 15]
    assert found["costs"]["total_cpu"] == found["costs"]["fit"]["cpu"] == 2.0
    imputed = {entry["id"]: entry["imputed"] for entry in found["architectures"] if entry["imputed"]}
    assert imputed == {"net2": ["score"], "net40": ["score"]}


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.works: list[tuple[str, int | None]] = []

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Bar]:
        self.works.append((description, total))
        with super().work(description, total, done=done) as bar:
            yield bar


def test_any_seed_of_a_recipe_will_do() -> None:
    table, _ = made(0, architectures=10, trained=8)
    config = RankConfig(predictor=GaussianProcess(), repeats=1, folds=2, refits=2, draws=100, seed=2**63 - 1)
    assert len(rank_table(table, config).entries) == 10


def test_progress_is_told() -> None:
    recorder = Recorder()
    rank_table(made(0)[0], CONFIG.model_copy(update={"curve": (5,), "curve_repeats": 2}), progress=recorder)
    assert recorder.works == [
        ("out of fold", 10),
        ("learning curve", 2),
        ("next trainings", 3),
        ("intervals of ranks", 10),
    ]


def test_what_cannot_be_believed_is_said() -> None:
    table, _ = made(0)
    noise = np.random.default_rng(0).normal(size=60)
    quality = np.where(table.trained, noise, np.nan)
    inputs = np.column_stack([table.inputs[:, :3], noise])
    chance = Table(table.ids, table.columns, table.inputs, quality, table.trainings, {}, table.rows)
    assert any("may be chance" in notice for notice in rank_table(chance, CONFIG).notices)
    telling = Table(table.ids, table.columns, inputs, quality, table.trainings, {}, table.rows)
    notices = rank_table(telling, CONFIG).notices
    assert not any("may be chance" in notice for notice in notices)
    assert any(notice.endswith("as well as the predictor does: score") for notice in notices)
    inputs[:, 3] *= -1
    turned = rank_table(Table(table.ids, table.columns, inputs, quality, table.trainings, {}, table.rows), CONFIG)
    assert any("as well as the predictor does: score (the less the better)" in notice for notice in turned.notices)


def test_too_few_trainings_are_said() -> None:
    with pytest.raises(DataError, match="too few architectures"):
        rank_table(made(0, trained=3)[0], CONFIG)


@pytest.mark.parametrize("wrong", [{"folds": 1}, {"level": 1.0}, {"noise": float("inf")}, {"predictors": "ridge"}])
def test_settings_have_bounds(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RankConfig.model_validate(wrong)
