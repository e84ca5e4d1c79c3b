"""Tables of architectures: what describes each, what was measured of it, and what that took.

Read from CSV files, of this tool or another; the user says which columns are what.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.ranking import Floats
from mil_cli.errors import DataError, did_you_mean
from mil_cli.files import writing

Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]

Cell: TypeAlias = str | float | int | None

Part: TypeAlias = Literal["scores", "partial", "training"]
"""What seconds were spent on."""

_EMPTY = {"", "na", "n/a", "null", "none"}


@dataclass(frozen=True, eq=False)
class Table:
    """Architectures, each once.

    Attributes:
        ids: Their names, in the order in which they first came.
        columns: What the columns are; categories stand among the features, one for each choice.
        inputs: What a predictor may read, shape (architectures, inputs), in the order of `columns.numeric`; NaN where
            it is not known.
        quality: What a whole training reached, the mean of all rows; NaN if there was none or if it collapsed.
        trainings: How many whole trainings were merged; those that collapsed too.
        seconds: Of each column of seconds, the sum of all rows; NaN where no row says.
        rows: How many rows were merged.
    """

    ids: tuple[str, ...]
    columns: Columns
    inputs: Floats
    quality: Floats
    trainings: Ints
    seconds: Mapping[str, Floats]
    rows: Ints

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> Bools:
        """Whether there was a whole training."""
        return self.trainings > 0

    @property
    def known(self) -> Bools:
        """Whether an architecture's quality is known."""
        return np.isfinite(self.quality)

    @property
    def goodness(self) -> Floats:
        """The quality, or its negative where less of it is better."""
        return self.quality if self.columns.higher_is_better else -self.quality

    def spent(self, part: Part, clock: Literal["cpu", "wall"]) -> Floats:
        """Return the seconds that each architecture took for a part, shape (architectures,); NaN where not known."""
        seconds: Seconds = getattr(self.columns, f"{clock}_seconds")
        names: tuple[str, ...] = getattr(seconds, part)
        known = [self.seconds[name] for name in names]
        return np.sum(known, axis=0) if known else np.full(len(self), np.nan)


def read_table(path: Path, columns: Columns) -> Table:
    """Read a table from a CSV file with a header.

    Raises:
        DataError: The file cannot be read, a column is missing, or a cell is not what its column holds.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return table_of(_records(stream, path, columns), columns)
    except OSError as error:
        raise DataError(f"cannot read the table: {error.strerror or error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError("the table is no text in UTF-8", where=str(path), hint="save it as CSV, UTF-8") from error
    except csv.Error as error:
        raise DataError(f"the table is no CSV: {error}", where=str(path), hint="save it as CSV, UTF-8") from error


def write_table(table: Table, path: Path) -> None:
    """Write a table so that `read_table` with `table.columns` reads it again; each architecture is one row.

    Raises:
        OutputError: The file cannot be written.
    """
    columns = table.columns
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=columns.separator)
        writer.writerow(columns.all)
        for row, name in enumerate(table.ids):
            quality = repr(float(table.quality[row])) if table.trained[row] else ""
            numbers = [_written(value) for value in table.inputs[row]]
            spent = [_written(table.seconds[column][row]) for column in columns.seconds]
            writer.writerow([name, *numbers, quality, *spent])


def table_of(records: Iterable[tuple[str, Mapping[str, Cell]]], columns: Columns) -> Table:
    """Return the table of some records; those of the same id are merged.

    Numbers become the mean of what is known, choices the share of each, and seconds the sum: they were all spent.

    Args:
        records: Where each is from, and its cells by column.
        columns: What the columns are.

    Raises:
        DataError: A cell is not what its column holds, or there is no record.
    """
    places: dict[str, int] = {}
    groups: list[int] = []
    numbers: list[list[float]] = []
    choices: list[list[str]] = []
    trained: list[bool] = []
    for where, record in records:
        name = str(record[columns.id] or "").strip()
        if not name:
            raise DataError(f"the column '{columns.id}' names no architecture", where=where)
        groups.append(places.setdefault(name, len(places)))
        trained.append(not _is_empty(record[columns.quality]))
        read = (*columns.numeric, columns.quality, *columns.seconds)
        numbers.append([_number(record[column], column, where, columns) for column in read])
        choices.append([str(record[column] if record[column] is not None else "") for column in columns.categories])
    if not groups:
        raise DataError("the table has no rows", hint="give at least one architecture")
    one_hot, names = _one_hot(choices, columns.categories)
    if taken := sorted(set(names) & set(columns.all)):
        hint = "give the column another name: choices of categories become columns named so"
        raise DataError("a column has the name of a choice of another column", value=taken[0], hint=hint)
    return _merged(tuple(places), np.array(groups), np.array(numbers), one_hot, np.array(trained), columns, names)


def _merged(
    ids: tuple[str, ...],
    groups: Ints,
    numbers: Floats,
    one_hot: Floats,
    trained: Bools,
    columns: Columns,
    names: tuple[str, ...],
) -> Table:
    at_quality = len(columns.numeric)
    quality = np.where(np.isfinite(numbers[:, at_quality]), numbers[:, at_quality], np.nan)
    features = len(columns.features)
    inputs = np.column_stack([numbers[:, :features], one_hot, numbers[:, features:at_quality]])
    seconds = numbers[:, at_quality + 1 :]
    return Table(
        ids=ids,
        columns=columns.model_copy(update={"features": (*columns.features, *names), "categories": ()}),
        inputs=np.column_stack([_mean(column, groups, len(ids)) for column in inputs.T]),
        quality=_mean(quality, groups, len(ids)),
        trainings=np.bincount(groups[trained], minlength=len(ids)).astype(np.int64),
        seconds={name: _sum(column, groups, len(ids)) for name, column in zip(columns.seconds, seconds.T, strict=True)},
        rows=np.bincount(groups, minlength=len(ids)).astype(np.int64),
    )


def _sum(values: Floats, groups: Ints, count: int) -> Floats:
    """Return the sum of each group's values that are not NaN; NaN for a group without any."""
    known = ~np.isnan(values)
    sums = np.bincount(groups[known], weights=values[known], minlength=count)
    return np.where(np.bincount(groups[known], minlength=count) > 0, sums, np.nan)


def _mean(values: Floats, groups: Ints, count: int) -> Floats:
    known = ~np.isnan(values)
    return _sum(values, groups, count) / np.maximum(1, np.bincount(groups[known], minlength=count))


def _one_hot(choices: list[list[str]], categories: tuple[str, ...]) -> tuple[Floats, tuple[str, ...]]:
    """Return 1 where a record has a choice and 0 elsewhere, shape (records, choices), and the names of the choices."""
    columns: list[Floats] = []
    names: list[str] = []
    for place, category in enumerate(categories):
        chosen = np.array([row[place].strip() for row in choices])
        for choice in sorted(set(chosen.tolist())):
            columns.append((chosen == choice).astype(np.float64))
            names.append(f"{category}={choice}")
    return (np.column_stack(columns) if columns else np.empty((len(choices), 0))), tuple(names)


def _records(stream: Iterable[str], path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Cell]]]:
    reader = csv.reader(stream, delimiter=columns.separator, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise DataError("the table is empty", where=str(path), hint="its first line must name the columns")
    for column in columns.all:
        if header.count(column) != 1:
            what, hint = ("there are two columns", "give one of them another name")
            if column not in header:
                what, hint = "there is no column", did_you_mean(column, set(header))
            raise DataError(f"{what} '{column}'", where=f"{path}:1", hint=hint)
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"the row has {len(cells)} cells, and the header {len(header)}",
                where=where,
                hint=f"cells are separated by '{columns.separator}'; those that hold one need quotation marks",
            )
        yield where, dict(zip(header, cells, strict=True))


def _is_empty(cell: Cell) -> bool:
    return cell is None or str(cell).strip().lower() in _EMPTY


def _number(cell: Cell, column: str, where: str, columns: Columns) -> float:
    if _is_empty(cell):
        return math.nan
    try:
        value = float(cell)  # type: ignore[arg-type]  # an empty cell is none
    except ValueError:
        hint = "leave the cell empty if it is not known" + (
            "; columns of names belong under categories" if column in columns.features else ""
        )
        raise DataError(f"the column '{column}' holds no number", where=where, value=cell, hint=hint) from None
    if column in columns.seconds and (value < 0 or math.isinf(value)):
        what = f"the column '{column}' holds no duration in seconds"
        raise DataError(what, where=where, value=cell, hint="leave the cell empty if it is not known")
    return value


def _written(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))
