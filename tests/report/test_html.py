from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mil_cli.errors import OutputError
from mil_cli.report.charts import Axis, Sample, scatter, training_chart
from mil_cli.report.html import page, write_html

Make = Callable[..., dict[str, Any]]

VOID = {"meta", "line", "circle", "polyline", "br", "rect", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a page would load and what it says."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "iframe", "link", "img", "object", "embed")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(make_report: Make) -> None:
    content = page(make_report())
    parsed = Page(content)
    assert parsed.loads == []
    assert not re.search(r"url\(|@import|https?://", content)
    assert "prefers-color-scheme: dark" in content
    for words in (
        "1 of 3 goals missed",
        "4.13x faster (95 % 4.04x to 4.23x)",
        "accuracy, test split, 10,000 samples",
        "Qualities in this table are of the val split",
        "val did not improve for 5 epochs",
        "layer1.0.conv1.weight",
        "16 x 32 x 3 x 3",
        "plain training of the same student (dashed)",
        "reached after 390 steps, by plain training of the same student after 780 (50 % of the steps)",
        "the batch axis of input x is free",
    ):
        assert words in parsed.text
    assert "estimate" not in parsed.text


def test_what_users_write_is_escaped(make_report: Make) -> None:
    attack = "<script>alert(1)</script>"
    report = make_report(name=attack, notices=[attack])
    report["stages"][0] |= {"name": attack, "notes": {attack: attack, "rest": {attack: [attack]}}}
    report["recipe"] = {"name": attack}
    content = page(report)
    assert "<script" not in content
    assert Page(content).text.count(attack) >= 6


def test_a_report_with_little_in_it_has_a_page(make_report: Make) -> None:
    report = make_report(goals=[], goals_met=True, stages=[], parity=None, notices=[])
    for missing in ("preparation", "device", "environment", "name", "command"):
        del report[missing]
    for part in ("baseline", "final"):
        for key in ("latency_ms", "throughput_per_s", "peak_memory_bytes", "size_bytes"):
            report[part][key] = None
    assert "no goals were set" in Page(page(report)).text


def test_estimates_are_labelled(make_report: Make) -> None:
    report = make_report()
    report["device"]["watts"] = 15.0
    for part in ("baseline", "final"):
        report[part]["energy_j"] = 15.0 * report[part]["latency_ms"]["p50"] / 1000
    assert "Energy is an estimate" in Page(page(report)).text


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, make_report: Make) -> None:
    write_html(make_report(), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["report.html"]
    with pytest.raises(OutputError):
        write_html(make_report(), tmp_path / "report.html" / "no.html")


def test_axes_keep_values_inside_and_in_order() -> None:
    for values, logarithmic in (
        ([1.0, 5.0, 9.0], False),
        ([0.9, 0.9], False),
        ([1e3, 1e4, 1e7], True),
        ([300.0, 305.0], True),
    ):
        axis = Axis(values, 50, 500, logarithmic=logarithmic)
        places = [axis.place(value) for value in values]
        assert places == sorted(places)
        assert 50 <= min(places) <= max(places) <= 500
        ticks = axis.ticks(str)
        assert len(ticks) >= 2
        assert all(50 <= tick.position <= 500 for tick in ticks)


def test_the_line_of_a_scatter_joins_the_best() -> None:
    samples = [Sample(x, y, str(x), "", on_front=False) for x, y in ((1, 1), (2, 3), (3, 2), (4, 4), (4, 3.5))]
    chart = scatter("t", samples, x_label="x", y_label="y", write_x=str, higher_is_better=True)
    assert chart is not None
    where = {(dot.x, dot.y): sample for dot, sample in zip(chart.dots, samples, strict=True)}
    line = [tuple(map(float, point.split(","))) for point in chart.lines["front"].split()]
    assert [(where[place].x, where[place].y) for place in line] == [(1, 1), (2, 3), (4, 4)]  # type: ignore[index]
    lower = scatter("t", samples, x_label="x", y_label="y", write_x=str, higher_is_better=False)
    assert lower is not None
    assert lower.lines == {}
    assert scatter("t", [], x_label="x", y_label="y", write_x=str, higher_is_better=True) is None


def test_dots_on_one_another_share_a_label() -> None:
    samples = [
        Sample(x, 1.0, name, f"title {name}", on_front=False) for x, name in ((1, "a"), (1, "b"), (9, "c"), (1, "d"))
    ]
    chart = scatter("t", samples, x_label="x", y_label="y", write_x=str, higher_is_better=True)
    assert chart is not None
    assert [dot.label for dot in chart.dots] == ["a, b, d", "", "c", ""]
    assert "title a" in chart.dots[1].title
    assert "title b" in chart.dots[1].title


def test_a_training_without_val_shows_its_loss() -> None:
    history = [{"epoch": epoch, "train_loss": 1 / epoch} for epoch in range(1, 5)]
    chart = training_chart(history, metric="accuracy")
    assert chart is not None
    assert chart.y_label == "loss"
    assert training_chart(history[:1], metric="accuracy") is None
    assert training_chart([{"epoch": 1, "train_loss": float("nan")}] * 3, metric="accuracy") is None
