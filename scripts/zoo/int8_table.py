"""The results of quantization as a page: how far files are off their graphs, and what runs on integers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from scripts.zoo.int8_reasons import why_float
from scripts.zoo.table import cell, outcome, problems, short

Row = dict[str, Any]

_COMPARED = """\
What is compared, as root mean square over the range (largest less smallest) of the float model's outputs, on
{batches} batches of noise that calibration has not seen:

- **file**: the ONNX file in onnxruntime less the quantized graph in torch. It passes if it is at most
  {tolerance:.0%}, or no more than the graph is off the float model.
- **rounding**: the quantized graph less the float model: what 8 bits do.
- **unfused**: the same file with onnxruntime's optimisations off, which computes in float between the roundings
  as torch does, less the graph. Nothing but the order of float sums differs.
- **kernels**: the file less the unfused file: what integer kernels do otherwise. They take biases as integers;
  their sums are exact.

A value next to a rounding threshold falls to the other side by the smallest difference, and each that does
pushes others over theirs; a deep network of random weights has nothing that would damp this. Two evaluations
that are both right so end up as far apart as two independent roundings would be, 1.41 times the rounding. That
is why the bound cannot be a fixed share of the range, and why classes are not compared: on random weights their
scores lie closer together than the rounding."""


def page(rows: Iterable[Row], versions: str, *, total: int) -> str:
    """Return the results as Markdown.

    Args:
        rows: One for each model.
        versions: Of the libraries, in words.
        total: How many models there are, run or not.
    """
    ordered = sorted(rows, key=lambda row: row["name"].lower())
    return (
        "\n".join([*_heading(ordered, versions, total), *problems(ordered), *_models(ordered), *_float(ordered)]) + "\n"
    )


def _heading(rows: Sequence[Row], versions: str, total: int) -> list[str]:
    from scripts.zoo.int8 import COMPARED, TOLERANCE

    by = Counter(outcome(row) for row in rows)
    known = [row for row in rows if "difference" in row]
    compared = _COMPARED.format(batches=COMPARED, tolerance=TOLERANCE)
    lines = [
        "# Public models after post-training quantization",
        "",
        f"`make zoo ARGS=--int8`; {versions}. Random weights, noise as data.",
        "Each model: captured, quantized by `quantize/static` as it is by itself, exported, run in",
        "onnxruntime and held against its graph. A row is of the run in which its model was last checked, which may be",
        "of an earlier state of the code.",
        "",
        compared,
        "",
        f"- {len(rows)} of {total} models run: **{by['pass']} pass**, {by['fail']} fail,"
        f" {by['original']} fail a step that their original fails too.",
    ]
    if known:
        shares = [row["difference"] / row["rounding"] for row in known]
        lines += [
            f"- File: median {_percent(statistics.median(row['difference'] for row in known))},"
            f" largest {_percent(max(row['difference'] for row in known))} of the range;"
            f" of the rounding: median {statistics.median(shares):.2f}, largest {max(shares):.2f}.",
            f"- Unfused: median {_percent(statistics.median(row['writing'] for row in known))};"
            f" kernels: median {_percent(statistics.median(row['kernels'] for row in known))}.",
        ]
    forms = {row["reduce_range"] for row in rows if "reduce_range" in row}
    if forms:
        lines.append(f"- Weights of {' or '.join('7' if reduced else '8' for reduced in sorted(forms))} bits.")
    return lines


def _models(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "## Models",
        "",
        "Layers: on integer kernels, of all with weights. Differences in percent of the range.",
        "",
        "| model | | policy | layers | macs M | params M | file MB | file | largest | rounding | unfused | kernels |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        integer = sum(row.get("integer", {}).values())
        every = row.get("quantized_layers", 0) + len(_kept(row))
        figures = ("difference", "largest", "rounding", "writing", "kernels")
        cells = [
            short(row["name"]),
            outcome(row),
            row.get("policy", ""),
            f"{integer}/{every}" if "integer" in row else "",
            *(f"{row[name] / 1e6:.1f}" if name in row else "" for name in ("macs", "params", "bytes")),
            *(f"{100 * row[name]:.2f}" if name in row else "" for name in figures),
        ]
        lines.append("| " + " | ".join(str(each) for each in cells) + " |")
    return lines


def _kept(row: Row) -> dict[str, str]:
    """Return the layers with weights that stay float, with the reason; products of activations are none."""
    return {name: reason for name, reason in row.get("kept_float", {}).items() if "two activations" not in reason}


def _float(rows: Sequence[Row]) -> list[str]:
    """Return what stays float: by reason the operators, by model how many of each, and layers by name."""
    known = [row for row in rows if "float_operators" in row]
    reasons: dict[str, set[str]] = {}
    for row in known:
        for operator in row["float_operators"]:
            reasons.setdefault(_why(operator, row["policy"]), set()).add(operator)
    lines = ["", "## What stays float", "", "Operators of onnxruntime's optimised graph that compute with floats.", ""]
    lines += [f"- {', '.join(sorted(operators))}: {reason}." for reason, operators in sorted(reasons.items())]
    lines += ["", "| model | operators | layers with weights |", "|---|---|---|"]
    for row in known:
        operators = ", ".join(f"{count} {name}" for name, count in row["float_operators"].items())
        kept = Counter(_kept(row).values())
        layers = "; ".join(f"{count}: {reason}" for reason, count in kept.items())
        lines.append(f"| {short(row['name'])} | {operators or 'none'} | {cell(layers) or 'none'} |")
    return lines


def _why(operator: str, policy: str) -> str:
    return why_float(operator, policy) or "no reason known"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
