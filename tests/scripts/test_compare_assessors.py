"""Ways to judge architectures on a data set: their figures by brute force, and all of it on a tiny one."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from mil_cli.assess.predictors.base import Prediction
from mil_cli.assess.ranking import Floats, Interval
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import CostCounter, DesignedSpace
from scripts import assessment_figures
from scripts.architecture_data import Architectures
from scripts.architecture_points import SCORES
from scripts.assessment_figures import Figures, Way, ceiling, curves, learned, select, sizes, together, worth
from scripts.assessment_picture import picture
from scripts.compare_assessors import main

EPOCHS = 4


def _space() -> DesignedSpace:
    return DesignedSpace(small_nets(widths=((4, 8), (8, 16)), blocks=(1, 1)))


def _table(file: Path, count: int = 24) -> Path:
    """Write a table whose quality follows from the operations and from chance."""
    space, generator, chance = _space(), torch.Generator().manual_seed(0), np.random.default_rng(0)
    counter = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    drawn = space.unique(space.sample(generator) for _ in range(10 * count))[:count]
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(drawn):
        for seed in range(2 if number < 6 else 1):
            macs = counter.macs(one)
            row: dict[str, Any] = {"id": f"n{number}", "seed": seed}
            row |= {decision.name: one.get(decision.name, "") for decision in space.decisions}
            row |= {"macs": macs, "params": counter.params(one), "capture_cpu_seconds": 1.0}
            row |= {name: chance.normal() for name in SCORES} | {f"{name}_cpu_seconds": 0.5 for name in SCORES}
            row |= {"training_cpu_seconds": 4.0, "validation_cpu_seconds": 2.0}
            for epoch in range(1, EPOCHS + 1):
                row |= {f"train_loss_{epoch}": chance.normal(), f"val_{epoch}": chance.normal()}
                row |= {f"{part}_cpu_seconds_{epoch}": 1.0 for part in ("training", "validation")}
            row["quality"] = 0.5 + 0.05 * math.log(macs) + 0.01 * chance.normal()
            rows.append(row)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Architectures:
    return Architectures.read(_table(tmp_path_factory.mktemp("data") / "table.csv"), _space())


def test_choices_are_read_as_they_were_drawn(data: Architectures) -> None:
    counter = CostCounter(data.space, (torch.zeros(1, 1, 28, 28),))
    found = [counter.macs(data.space.architecture(one)) for one in data.choices.values()]
    assert found == data.column("macs").tolist()
    assert data.encodings.shape == (24, len(data.space.encoding_names))


def test_figures_are_those_of_scipy_and_times_those_of_the_table(data: Architectures) -> None:
    (macs, _) = sizes(data)
    figures = worth(macs, data)
    assert figures.tau.value == pytest.approx(kendalltau(data.column("macs"), data.quality)[0])
    assert figures.tau.low < figures.tau.value < figures.tau.high
    assert math.isinf(figures.speed)
    after = {way.name: way for way in curves(data)}
    assert after["losses of 2 epochs"].seconds == 24 * (1 + 2)
    assert after["val after 2 epochs"].seconds == 24 * (1 + 2 + 1)
    assert data.whole.sum() == 24 * (1 + 4 + 1)  # captured, trained, evaluated once
    assert worth(after["val after 2 epochs"], data).speed == pytest.approx(6 / 4)
    top, low, high = ceiling(data)
    assert top == pytest.approx(kendalltau(*data.by_seed.T)[0])
    assert data.by_seed.shape == (6, 2)
    assert low <= top <= high


def test_ranks_are_added_and_so_are_times(data: Architectures) -> None:
    first = Way("a", "score", np.arange(24.0), 3.0)
    second = Way("b", "score", np.where(np.arange(24) == 0, 1e9, np.arange(24.0)), 4.0)
    both = together([first, second])
    assert both.name == "a + b"
    assert both.seconds == 7.0
    assert both.scores[0] == (1 + 24) / 2
    assert both.scores[23] == (24 + 23) / 2


def test_a_predictor_is_judged_on_what_it_has_not_seen(data: Architectures, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows by heart what it learned from, and nothing else, ranks no better than chance."""
    judged: list[int] = []

    class ByHeart:
        def fit(self, features: Floats, values: Floats, seed: int) -> ByHeart:
            self.known = {tuple(row): value for row, value in zip(features.tolist(), values.tolist(), strict=True)}
            return self

        def predict(self, features: Floats) -> Prediction:
            mean = np.array([self.known.get(tuple(row), 0.0) for row in features.tolist()])
            return Prediction(mean, np.ones_like(mean))

    def tau(scores: Floats, truth: Floats) -> float:
        judged.append(len(scores))
        assert not scores.any()
        return 0.0

    monkeypatch.setattr(assessment_figures, "tau_b", tau)
    found = learned("by heart", ByHeart(), list(sizes(data)), data, trained=10)
    assert set(judged) == {14}
    assert found.tau.value == 0.0
    assert found.seconds >= 10 * 6
    assert found.speed <= 24 / 10


@pytest.mark.parametrize("trained", [1, 3])
def test_what_random_trainings_find_by_brute_force(data: Architectures, trained: int) -> None:
    bound = float(np.sort(data.column("macs"))[8])
    within = np.flatnonzero(data.column("macs") <= bound)
    assert len(within) == 9
    way = Way("macs", "size", data.column("macs"), 12.0)
    found = select(way, data, bound=bound, trained=trained)
    truth = data.quality[within]
    best = np.argsort(-data.column("macs")[within], kind="stable")[:trained]
    assert found.regret == pytest.approx(truth.max() - truth[best].max())
    assert found.seconds == pytest.approx(12.0 * 9 / 24 + 6 * trained)

    def short(count: int) -> float:
        return float(np.mean([truth.max() - max(some) for some in itertools.combinations(truth, count)]))

    assert short(found.random) <= found.regret + 1e-12
    assert found.random == 1 or short(found.random - 1) > found.regret
    assert found.speed == pytest.approx(6 * found.random / found.seconds)


@pytest.mark.slow
def test_all_of_it_on_a_tiny_data_set(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "defaults:\n  - /mil/defaults\n  - /data: digits\n  - /task: classification\n  - /device: host_cpu\n"
        "  - /stage/train@stages.train: supervised\n  - _self_\nchain: [train]\n"
        "model: {_target_: mil_cli.models.small_nets.small_nets, widths: [[4, 8], [8, 16]], blocks: [1, 1]}\n"
        "trainer: {epochs: 2, batch_size: 64}\n"
    )
    table, out = _table(tmp_path / "table.csv"), tmp_path / "page.md"
    words = [str(recipe), "--table", str(table), "--out", str(out), "--methods", "steps_20", "half_80", "spos_10"]
    assert main(words) == 0
    text = out.read_text()
    assert "| steps_20 loss | few steps |" in text
    assert "| half_80 val | few steps |" in text
    assert "| spos_10 val | supernet |" in text
    assert "| macs | size | - |" in text
    assert "At least 10 times faster" in text
    assert "What costs nothing reaches of the ceiling: macs" in text


def test_the_picture_names_what_none_beats_in_both() -> None:
    found = [
        Figures(name, "mix", seconds, 1.0, Interval(tau, tau, tau), 0.0, 0.0, 0.0)
        for name, seconds, tau in (
            ("cheap", 10.0, 0.5),
            ("beaten", 20.0, 0.4),
            ("good", 100.0, 0.8),
            ("free", 0.0, 0.7),
        )
    ]
    svg = ElementTree.fromstring(picture(found))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cheap", "good"} <= set(texts)
    assert not {"beaten", "free"} & set(texts)
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 3
