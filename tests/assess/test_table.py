"""Tables of architectures: what is read, merged, written and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.table import read_table, table_of, write_table
from mil_cli.errors import DataError

COLUMNS = Columns(
    id="arch",
    features=("depth",),
    categories=("op",),
    scores=("synflow",),
    partial=("early",),
    quality="accuracy",
    cpu_seconds=Seconds(scores=("score_s",), training=("train_s", "augment_s")),
)

HEADER = "arch,depth,op,synflow,early,accuracy,score_s,train_s,augment_s,remark\n"

ROWS = (
    HEADER
    + "a,2,conv,1e30,0.5,0.90,0.1,100,5,x\n"
    + "b,4,pool,inf,0.6,,0.1,,,\n"
    + "a,2,conv,3e30,,0.92,0.1,120,5,\n"
    + 'c,3,"sep, 3x3",,0.1,nan,0.2,80,5,collapsed\n'
)


def written(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_another_tool_is_read_and_duplicates_are_merged(tmp_path: Path, encoding: str) -> None:
    table = read_table(written(tmp_path, ROWS, encoding), COLUMNS)
    assert table.ids == ("a", "b", "c")
    assert table.columns.numeric == ("depth", "op=conv", "op=pool", "op=sep, 3x3", "synflow", "early")
    nan = np.nan
    expected = [[2, 1, 0, 0, 2e30, 0.5], [4, 0, 1, 0, np.inf, 0.6], [3, 0, 0, 1, nan, 0.1]]
    np.testing.assert_array_equal(table.inputs, expected)
    np.testing.assert_allclose(table.quality, [0.91, nan, nan])
    assert table.trained.tolist() == [True, False, True]
    assert table.known.tolist() == [True, False, False]
    assert table.rows.tolist() == [2, 1, 1]
    np.testing.assert_allclose(table.spent("scores", "cpu"), [0.2, 0.1, 0.2])
    np.testing.assert_allclose(table.spent("training", "cpu"), [230, nan, 85])
    assert np.isnan(table.spent("training", "wall")).all()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, ROWS), COLUMNS)
    write_table(table, tmp_path / "merged.csv")
    again = read_table(tmp_path / "merged.csv", table.columns)
    assert again.ids == table.ids
    assert again.columns == table.columns
    np.testing.assert_array_equal(again.inputs, table.inputs)
    np.testing.assert_array_equal(again.quality, table.quality)
    np.testing.assert_array_equal(again.trained, table.trained)
    for name in table.columns.seconds:
        np.testing.assert_array_equal(again.seconds[name], table.seconds[name])


def test_isomorphic_architectures_share_their_choices() -> None:
    columns = Columns(categories=("first", "second"))
    records = [
        {"id": "same", "first": "skip", "second": "conv", "quality": 0.8},
        {"id": "same", "first": "conv", "second": "skip", "quality": None},
    ]
    table = table_of([(f"row {number}", record) for number, record in enumerate(records)], columns)
    np.testing.assert_array_equal(table.inputs, [[0.5, 0.5, 0.5, 0.5]])
    assert table.quality.tolist() == [0.8]


def test_less_may_be_better() -> None:
    columns = Columns(features=("depth",), quality="loss", higher_is_better=False)
    table = table_of([("row", {"id": "a", "depth": 1, "loss": 0.25})], columns)
    assert table.goodness.tolist() == [-0.25]
    assert table.quality.tolist() == [0.25]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("table.csv", "empty", "first line")),
        (HEADER, ("no rows",)),
        (HEADER.replace("accuracy", "acuracy"), ("no column 'accuracy'", "table.csv:1", "did you mean 'acuracy'")),
        (HEADER.replace("remark", "depth"), ("two columns 'depth'", "another name")),
        (HEADER + "a,2,conv,1\n", ("4 cells", "header 10", "table.csv:2")),
        (ROWS + "d,deep,conv,1,1,,0,,,\n", ("table.csv:6", "'depth'", "no number", "'deep'", "categories")),
        (ROWS + "d,3,conv,1,1,good,0,,,\n", ("table.csv:6", "'accuracy'", "no number", "'good'")),
        (ROWS + "d,3,conv,1,1,,-2,,,\n", ("table.csv:6", "'score_s'", "no duration", "'-2'")),
        (ROWS + " ,3,conv,1,1,,0,,,\n", ("table.csv:6", "'arch' names no architecture")),
        (HEADER + 'a,2,"conv"x,1,1,,0,,,\n', ("no CSV",)),
    ],
)
def test_a_wrong_table_says_where_and_what(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        read_table(written(tmp_path, text), COLUMNS)
    for word in words:
        assert word in str(caught.value)


def test_a_column_named_as_a_choice_is_refused() -> None:
    columns = Columns(features=("op=conv",), categories=("op",))
    with pytest.raises(DataError, match="'op=conv'"):
        table_of([("row", {"id": "a", "op": "conv", "op=conv": 1, "quality": 1})], columns)


def test_files_that_are_no_text_or_missing_are_said(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match="UTF-8"):
        read_table(tmp_path / "table.csv", COLUMNS)
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "other.csv", COLUMNS)


def test_another_separator(tmp_path: Path) -> None:
    columns = Columns(features=("depth",), separator=";")
    table = read_table(written(tmp_path, "id;depth;quality\na;3;0.5\n\n"), columns)
    assert table.inputs.tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": ["a"], "scores": ["a"]}, "'a' is named twice"),
        ({"features": ["a"], "cpu_seconds": {"training": ["quality"]}}, "'quality' is named twice"),
        ({}, "nothing describes"),
        ({"features": ["a"], "colour": "red"}, "Extra inputs"),
    ],
)
def test_columns_that_cannot_be_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Columns.model_validate(settings)
