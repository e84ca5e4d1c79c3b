"""What comparisons share: points go into rows once, failures and clocks spare the others, intervals, the table."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import mil_cli
from mil_cli.recipe.load import load_recipe
from scripts.compare_pruning import main
from scripts.comparison import (
    Limits,
    Point,
    Result,
    Rows,
    carry_out,
    code_of,
    compute,
    origin_of,
    paired_interval,
    parser_of,
    table,
)
from scripts.pool import append_row, read_rows
from tests.recipe.conftest import RECIPE


def square(folder: Path, point: Point) -> Result:
    """Note that the point was computed, and whether the first phase had ended."""
    with (folder / "calls").open("a") as file:
        file.write(point["method"])
    if point["method"] == "breaks":
        raise ValueError("no such method")
    if point["method"] == "sleeps":
        time.sleep(120)
    return {"square": point["seed"] ** 2, "after_the_first": (folder / "calls").read_text().startswith("first")}


def points(*methods: str, of: str = "code") -> list[Point]:
    return [{"method": method, "seed": 3, "of": of} for method in methods]


@pytest.mark.slow
def test_a_failing_point_spares_the_others_and_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    kept, work = tmp_path / "deep" / "rows.jsonl", partial(square, tmp_path)
    phases = [points("first"), points("breaks", "a", "b")]
    (failure,) = compute(work, phases, kept, Limits(jobs=2, timeout=300))
    assert failure.startswith("breaks 3: ")
    assert "no such method" in failure
    assert Rows(kept).result(points("b")[0]) == {"square": 9, "after_the_first": True}

    (tmp_path / "calls").write_text("")
    with kept.open("a") as file:
        file.write('{"point": {"meth')  # killed while it wrote
    assert len(compute(work, phases, kept, Limits(timeout=300))) == 1
    assert (tmp_path / "calls").read_text() == "breaks"


@pytest.mark.slow
def test_rows_of_other_code_are_not_taken(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    compute(partial(square, tmp_path), [points("a")], kept, Limits(timeout=300))
    changed = points("a", of="other code")
    assert Rows(kept).result(changed[0]) is None
    assert Rows(kept).stale(changed) == 1
    assert Rows(kept).stale(points("a")) == 0
    assert compute(partial(square, tmp_path), [changed], kept, Limits(timeout=300)) == []
    assert len(read_rows(kept)) == 2


def test_all_ends_when_the_time_is_over(tmp_path: Path) -> None:
    start = time.monotonic()
    kept = tmp_path / "rows.jsonl"
    failures = compute(partial(square, tmp_path), [points("sleeps", "late")], kept, Limits(timeout=600, seconds=3))
    assert time.monotonic() - start < 110
    assert [failure.partition(" ")[0] for failure in failures] == ["sleeps", "late"]
    assert read_rows(kept) == []


def test_a_row_after_a_half_written_one_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"b"')
    append_row(file, {"c": 2})
    assert read_rows(file) == [{"a": 1}, {"c": 2}]


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    first, second = [1.0, 2.5, 3.0, 7.0], [0.5, 2.0, 4.0, 3.0]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert paired_interval(list(zip(first, second, strict=True))) == pytest.approx((expected.low, expected.high))
    assert paired_interval([(1.0, 2.0)]) is None


def test_the_table_compares_with_the_best_of_the_reference_and_tells_what_is_missing() -> None:
    known = {
        ("ours", 0.5): {0: 1.0, 1: 2.0, 2: 3.0},
        ("good", 0.5): {0: 2.0, 1: 3.0, 2: 4.0},
        ("bad", 0.5): {0: 9.0, 1: 9.0, 2: 9.0},
        ("part", 0.5): {0: 0.1, 2: 0.3},
        ("ours", 0.1): {0: 1.0, 2: 2.0},
    }

    def value(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        return known.get((method, column["macs"]), {}).get(seed)

    columns = {"half": {"macs": 0.5}, "tenth": {"macs": 0.1}}
    lines = table(["ours", "good", "bad", "part"], columns, [0, 1, 2], value, reference=["good", "bad", "part"])
    assert lines == [
        "| method | half | tenth |",
        "|---|---|---|",
        "| `ours` | **2.00 %** (-1.00 to -1.00) | 1.50 %, 2 of 3 seeds |",
        "| `good` | 3.00 % | - |",
        "| `bad` | 9.00 % | - |",
        "| `part` | 0.20 %, 2 of 3 seeds | - |",
        "",
        "In bold: the least of a column, of methods with all seeds.",
    ]


def recipe_file(folder: Path) -> Path:
    start = RECIPE.index("goals:")
    stages = "stages:\n  prune: {macs: 0.5, round_to: 1}\n  tune: {trainer: {epochs: 1}}\ntrainer: {epochs: 1}\n"
    text = RECIPE[:start].replace("/stage/distill@stages.recover: soft_labels", "/stage/train@stages.tune: supervised")
    text = text.replace("  - /stage/quantize@stages.quantize: static\n", "")
    file = folder / "recipe.yaml"
    file.write_text(f"{text}chain: [prune, tune]\n{stages}", encoding="utf-8")
    return file


@pytest.mark.slow
def test_the_origin_follows_from_settings_and_code_and_not_from_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, script = recipe_file(tmp_path), tmp_path / "compare.py"
    script.write_text("SEEDS = 3")

    def origin(*overrides: str) -> str:
        return origin_of(load_recipe(file, overrides), script)

    assert origin() == origin("seed=5") == origin("device.price_per_hour=3")
    changes = ["stages.prune.norm=1", "stages.tune.trainer.epochs=2", "trainer.learning_rate=0.3"]
    different = [origin(), *(origin(change) for change in changes)]
    assert len(set(different)) == len(different)
    before = origin()
    assert origin_of(load_recipe(file), script, "1.0") != origin_of(load_recipe(file), script, "1.1")
    # A stage that another one runs is no link of the chain itself.
    assert origin("chain=[prune]") != origin("chain=[prune]", "stages.tune.trainer.epochs=2")
    package = tmp_path / "package"
    for folder in ("export", "graph", "measure", "ops", "stages", "training", "report"):
        shutil.copytree(Path(mil_cli.__file__).parent / folder, package / folder)
    monkeypatch.setattr(mil_cli, "__file__", str(package / "__init__.py"))
    code_of.cache_clear()
    assert origin() == before
    for changed in (package / "stages" / "judging.py", package / "export" / "packing.py", script):
        changed.write_text(changed.read_text() + "# changed")
        code_of.cache_clear()
        assert origin() != before
        before = origin()
    (package / "report" / "text.py").write_text("# of no matter")
    code_of.cache_clear()
    assert origin() == before


@pytest.mark.slow
def test_pruning_is_compared_point_by_point_and_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.md"
    words = [str(recipe_file(tmp_path)), "--out", str(out), "--macs", "0.5", "--seeds", "0", "--methods", "magnitude"]
    assert main(words) == 0
    rows = {row["point"]["method"]: row for row in read_rows(out.with_suffix(".jsonl"))}
    assert set(rows) == {"original", "magnitude"}
    assert 0.3 < rows["magnitude"]["result"]["share"] <= 0.5
    drop = 100 * (1 - rows["magnitude"]["result"]["quality"] / rows["original"]["result"]["quality"])
    assert f"| `magnitude` | {drop:.2f} % |" in out.read_text()

    text = out.read_text()
    out.unlink()
    capsys.readouterr()
    assert main([*words, "--known-only"]) == 0
    assert out.read_text() == text
    assert main([*words, "--known-only", "--set", "trainer.learning_rate=0.01"]) == 1
    assert out.read_text() == text
    told = capsys.readouterr().err
    assert "2 rows of" in told
    assert "page.md is left alone" in told
    assert json.loads(out.with_suffix(".jsonl").read_text().splitlines()[0])["point"]["method"] == "original"


def test_shards_share_the_points_out_and_rows_of_other_code_are_taken_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [points("first"), points("a", "b", "c")]
    out = tmp_path / "page.md"
    asked: list[str] = []

    def note(work: object, missing: list[list[Point]], kept: Path, limits: Limits) -> list[str]:
        asked.append("".join(point["method"] for phase in missing for point in phase))
        return []

    def run(*words: str) -> str:
        parser = parser_of(None, methods=("a",), out=out)
        carry_out(parser.parse_args(["recipe.yaml", *words]), _nothing, phases, _known)
        return out.read_text()

    monkeypatch.setattr("scripts.comparison.compute", note)
    assert [run("--shard", shard) for shard in ("1/2", "2/2")] == ["\n", "\n"]
    environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
    for point in points("b", of="earlier code"):
        append_row(out.with_suffix(".jsonl"), {"point": point, "result": {}, "environment": environment})
    assert run() == "\n"
    assert "1 rows" in capsys.readouterr().err
    assert run("--trust-rows").startswith("b\n\nSome rows are of other code")
    assert asked == ["firstac", "b", "firstabc", "firstac"]


def test_a_row_of_this_code_goes_before_one_that_is_only_trusted(tmp_path: Path) -> None:
    kept = tmp_path / "rows.jsonl"
    for of in ("code", "earlier code"):
        for point in points("a", of=of):
            append_row(kept, {"point": point, "result": {"of": of}})
    rows = Rows(kept, trusted=True)
    assert rows.result(points("a")[0]) == {"of": "code"}
    assert not rows.foreign(points("a"))
    assert rows.result(points("a", of="later code")[0]) == {"of": "earlier code"}
    assert rows.foreign(points("a", of="later code"))


def _nothing(file: Path, overrides: object, location: Path, point: Point) -> Result:
    return {}


def _known(rows: Rows) -> list[str]:
    return ["".join(point["method"] for point in points("a", "b", "c") if point in rows)]
