"""Bits by layer beside one width for all: what is computed, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.compare_mixed import main
from scripts.comparison import Point
from scripts.pool import append_row, read_rows
from tests.recipe.conftest import RECIPE


def recipe_file(folder: Path) -> Path:
    text = RECIPE[: RECIPE.index("goals:")].replace("quantize: static", "quantize: mixed")
    for line in ("  - /stage/distill@stages.recover: soft_labels\n", "  - /stage/prune@stages.prune: magnitude\n"):
        text = text.replace(line, "")
    file = folder / "recipe.yaml"
    stages = "stages:\n  quantize: {average_bits: 4, samples: 64, probes: 2}\ntrainer: {epochs: 1}\n"
    file.write_text(f"{text}chain: [quantize]\n{stages}", encoding="utf-8")
    return file


def test_the_page_tells_errors_losses_and_their_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.md"
    points: list[Point] = []

    def note(arguments: object, work: object, phases: list[list[Point]], page: object, **_: object) -> int:
        points.extend(point for phase in phases for point in phase)
        return 0

    words = [str(recipe_file(tmp_path)), "--out", str(out), "--seeds", "0", "1", "--bits", "3", "--known-only"]
    with monkeypatch.context() as patched:
        patched.setattr("scripts.compare_mixed.carry_out", note)
        main([*words, "--methods", "uniform", "outputs"])
    found = {"original": ((0.9, 0.2), (0.8, 0.4)), "uniform": ((0.8, 0.3), (0.7, 0.6)), "outputs": ((0.9, 0.25),) * 2}
    for point in points:
        quality, loss = found[point["method"]][point["seed"]]
        costs = {"average_bits": 3.01, "seconds": 7.0}
        environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
        result = {"quality": quality, "loss": loss, **costs}
        append_row(out.with_suffix(".jsonl"), {"point": point, "result": result, "environment": environment})
    assert main([*words, "--methods", "uniform", "outputs"]) == 0
    text = out.read_text()
    assert "Uncompressed: 15.00 % test error, loss 0.3000 on val, mean of 2 seeds." in text
    assert "| `uniform` | 25.00 % |" in text
    # Errors are 10 and 10 % against 20 and 30 %: the differences -10 and -20 have the mean -15 and half-width 63.53.
    assert "| `outputs` | **10.00 %** (-78.53 to +48.53) |" in text
    assert "| `uniform` | 50.00 % |" in text
    assert "| `outputs` | 3.010, 7 |" in text


@pytest.mark.slow
def test_widths_by_layer_have_at_most_the_mean_of_one_width(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert main([str(recipe_file(tmp_path)), "--out", str(out), "--seeds", "0", "--bits", "3"]) == 0
    rows = {row["point"]["method"]: row["result"] for row in read_rows(out.with_suffix(".jsonl"))}
    assert set(rows) == {"original", "uniform", "outputs", "loss", "hessian"}
    for method in ("outputs", "loss", "hessian"):
        assert 2.5 < rows[method]["average_bits"] <= rows["uniform"]["average_bits"] + 1e-6
