"""Can any architecture be cut? Public models go through every step that stages rest on; the page says what came of it.

Of every model file of timm and torchvision the smallest model, and small random configurations of many families of
transformers: captured, analysed, cut at random, proven, trained for a step, saved, cut again, exported. Each runs in a
process of its own. Results are kept beside the page, one line a model, so that an interrupted run goes on.

With ``--int8`` thirty of timm's families are quantized after training instead, and the page says how well onnxruntime
computes what the graphs do, and what stays float.

    make zoo
    make zoo ARGS="--only *swin* --again"
    make zoo ARGS=--int8
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.pool import append_row, read_rows, run, shard
from scripts.zoo import int8_table, table
from scripts.zoo.table import failures, outcome

LIBRARIES = ("torch", "timm", "torchvision", "transformers", "onnxruntime")
PRELOADED = ("torch", "timm", "torchvision", "transformers", "onnxscript")

Row = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """What is done to which models.

    Attributes:
        module: Has the function ``check`` that does it.
        catalogues: Modules that name and make the models.
        rows: Where results are kept, one line a model.
        page: Makes the page of them.
    """

    module: str
    catalogues: tuple[str, ...]
    rows: Path
    page: Callable[..., str]


CUT = Mode(
    "scripts.zoo.checks",
    ("scripts.zoo.transformers_models", "scripts.zoo.torchvision_models", "scripts.zoo.timm_models"),
    Path("docs/results/zoo.jsonl"),
    table.page,
)
INT8 = Mode("scripts.zoo.int8", ("scripts.zoo.timm_families",), Path("docs/results/zoo_int8.jsonl"), int8_table.page)


def main(words: Sequence[str] | None = None) -> int:
    """Check the models that have no row yet, then write the page; return 1 if any model fails."""
    arguments = _arguments(words)
    kept: Path = arguments.rows
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["name"]: row for row in read_rows(kept)}  # of several for one model the last counts
    names = _names(arguments)
    index, count = arguments.shard
    wanted = [name for name in names[index - 1 :: count] if any(fnmatch(name, f"*{only}*") for only in arguments.only)]
    missing = [name for name in wanted if name not in rows or (arguments.again and outcome(rows[name]) != "pass")]
    start = time.monotonic()
    for number, name in enumerate(missing, 1):
        row = _checked(name, arguments)
        rows[name] = row
        append_row(kept, row)
        left = (time.monotonic() - start) / number * (len(missing) - number)
        reasons = "; ".join(f"{step}: {reason}" for step, reason in failures(row))
        print(f"[{number}/{len(missing)}, {left / 60:.0f} min left] {name}: {outcome(row)} {reasons}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = arguments.mode.page(rows.values(), _versions(), total=len({*names, *rows}))
    arguments.out.write_text(text, encoding="utf-8")
    return 1 if any(outcome(rows[name]) == "fail" for name in wanted) else 0


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return all models, from a list kept beside the rows: making it takes minutes."""
    file = arguments.rows.with_suffix(".names.json")
    key = [*arguments.catalogues, _versions()]
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("of") != key:
        names = [
            f"{module}:{name}" for module in arguments.catalogues for name in importlib.import_module(module).names()
        ]
        known = {"of": key, "names": names}
        file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return list(known["names"])


def _checked(name: str, arguments: argparse.Namespace) -> Row:
    check = importlib.import_module(arguments.mode.module).check
    start = time.monotonic()
    row = run(check, name, timeout=arguments.timeout, memory=arguments.memory * 2**30, preload=arguments.preload)
    return {"name": name, **row, "wall_seconds": round(time.monotonic() - start, 1)}


def _versions() -> str:
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--int8", dest="mode", action="store_const", const=INT8, default=CUT, help="quantize them")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PATTERN", help="models whose name matches")
    parser.add_argument("--again", action="store_true", help="check once more what did not pass")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th model from the I-th")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one model")
    parser.add_argument("--memory", type=int, default=12, help="GiB for one model")
    parser.add_argument("--rows", type=Path, help="results, one line a model")
    parser.add_argument("--out", type=Path, help="the page")
    parser.add_argument("--catalogues", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--preload", nargs="*", default=PRELOADED, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    mode: Mode = arguments.mode
    arguments.rows = arguments.rows or mode.rows
    arguments.out = arguments.out or arguments.rows.with_suffix(".md")
    arguments.catalogues = arguments.catalogues or mode.catalogues
    return arguments


if __name__ == "__main__":
    sys.exit(main())
