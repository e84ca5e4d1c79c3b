"""The results as a page: totals, what failed and why, and a line for each model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def outcome(row: Row) -> str:
    """Return ``pass``, ``original`` where only the original's own failures stand in the way, or ``fail``."""
    if row.get("failed") or row.get("ended"):
        return "fail"
    return "original" if row.get("original") else "pass"


def failures(row: Row) -> list[tuple[str, str]]:
    """Return step and reason of each failure that is ours."""
    ended = [(row.get("step", "start"), row["ended"])] if row.get("ended") else []
    return [*row.get("failed", {}).items(), *ended]


def page(rows: Iterable[Row], versions: str, *, total: int) -> str:
    """Return the results as Markdown.

    Args:
        rows: One for each model.
        versions: Of the libraries, in words.
        total: How many models there are, run or not.
    """
    ordered = sorted(rows, key=lambda row: row["name"].lower())
    return "\n".join([*_heading(ordered, versions, total), *problems(ordered), *_models(ordered)]) + "\n"


def _heading(rows: Sequence[Row], versions: str, total: int) -> list[str]:
    by = {kind: [row for row in rows if outcome(row) == kind] for kind in ("pass", "original", "fail")}
    judged = len(by["pass"]) + len(by["fail"])
    analysed = [row for row in rows if "cuttable_share" in row]
    lines = [
        "# Public models through the graph engine",
        "",
        f"`make zoo`; {versions}. Random weights; 40 % of the free classes of every space cut at random.",
        "Each model: capture, analysis, cut, proof against the masked original, another batch size, backward with a",
        "gradient on every parameter, exact `.pt2` round trip, a second cut from the archive, ONNX with parity.",
        "A row is of the run in which its model was last checked, which may be of an earlier state of the code.",
        "Mixtures of experts of transformers run as `batched_mm`: their default is an operator of transformers' own,",
        "which capture refuses.",
        "",
        f"- {len(rows)} models: **{len(by['pass'])} pass every step**, {len(by['fail'])} fail one,"
        f" {len(by['original'])} fail a step that their original fails too (by torch or onnxruntime alone).",
    ]
    if total > len(rows):
        lines.append(f"- {total - len(rows)} models of the list have not been run; totals say nothing about them.")
    if judged:
        lines.append(f"- Of those whose original does every step: {100 * len(by['pass']) / judged:.1f} % pass.")
    if analysed:
        shares = [row["cuttable_share"] for row in analysed]
        inner = [row["inner_share"] for row in analysed]
        kept = [row["macs_after"] / row["macs"] for row in analysed if row.get("macs_after") and row.get("macs")]
        seconds = [row["seconds"]["analyse"] for row in analysed]
        lines += [
            f"- Rows of weights that can be cut: median {statistics.median(shares):.3f}, lowest {min(shares):.3f}.",
            "- The same without the rows that make the model's outputs or are looked up by number (vocabularies,"
            f" positions), which no cut may change: median {statistics.median(inner):.3f}, lowest {min(inner):.3f}.",
            f"- Analysis: median {statistics.median(seconds):.2f} s of processor time, longest {max(seconds):.2f} s.",
            f"- Operators without a rule: {sum(len(row.get('unknown', ())) for row in rows)}.",
        ]
        if kept:
            lines.append(f"- Multiply-accumulates after the cut: median {statistics.median(kept):.2f} of before.")
    return lines


def problems(rows: Sequence[Row]) -> list[str]:
    """Return what failed and why, as a table; nothing if nothing did."""
    lines = []
    for title, found in (
        ("Failures", [(row["name"], *each) for row in rows for each in failures(row)]),
        (
            "Failures of the original",
            [(row["name"], *each) for row in rows for each in row.get("original", {}).items()],
        ),
    ):
        if found:
            lines += ["", f"## {title}", "", "| model | step | reason |", "|---|---|---|"]
            lines += [f"| {short(name)} | {step} | {cell(reason)} |" for name, step, reason in found]
    return lines


def _models(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "## Models",
        "",
        "Cuttable: share of the rows of all weights; inner: without rows of outputs and lookup tables. Spaces: free +",
        "frozen (of the free ones: inexact). Difference: largest of the proof, relative.",
        "",
        "| model | | nodes | cuttable | inner | spaces | macs M | params M | difference | unknown"
        " | capture / analysis / cut s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row.get("seconds", {})
        times = " / ".join(f"{seconds[step]:.1f}" if step in seconds else "" for step in ("capture", "analyse", "cut"))
        spaces = f"{row['free']}+{row['frozen']} ({row['inexact']})" if "free" in row else ""
        cells = [
            short(row["name"]),
            outcome(row),
            row.get("nodes", ""),
            f"{row['cuttable_share']:.3f}" if "cuttable_share" in row else "",
            f"{row['inner_share']:.3f}" if "inner_share" in row else "",
            spaces,
            _change(row, "macs"),
            _change(row, "params"),
            f"{row['difference']:.0e}" if "difference" in row else "",
            len(row["unknown"]) if "unknown" in row else "",
            times,
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _change(row: Row, figure: str) -> str:
    before, after = row.get(figure), row.get(f"{figure}_after")
    return " → ".join(f"{value / 1e6:.2f}" for value in (before, after) if value is not None)


def short(name: str) -> str:
    """Return a model's name with its library's."""
    return name.removeprefix("scripts.zoo.").replace("_models:", " ").replace("_families:", " ")


def cell(text: str) -> str:
    """Return a text as it can stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")
