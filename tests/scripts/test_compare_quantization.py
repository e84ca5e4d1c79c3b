"""Our quantizers beside others: what is compared, what is left out and why, and the page."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from scripts.compare_quantization import SETTINGS, main
from scripts.comparison import Point, Rows
from scripts.pool import append_row, read_rows
from scripts.quantization_peers import PEERS, Peer
from tests.recipe.conftest import RECIPE


def recipe_file(folder: Path) -> Path:
    start = RECIPE.index("goals:")
    text = RECIPE[:start].replace("/stage/distill@stages.recover: soft_labels", "/stage/train@stages.tune: supervised")
    text = text.replace("  - /stage/prune@stages.prune: magnitude\n", "")
    file = folder / "recipe.yaml"
    stages = "stages:\n  tune: {trainer: {epochs: 1}}\ntrainer: {epochs: 1}\n"
    file.write_text(f"{text}chain: [quantize]\n{stages}", encoding="utf-8")
    return file


def peer(package: str, version: str | None) -> Peer:
    return Peer(package, version, (), lambda bits: True, lambda material, bits: Path(), "another quantizer")


def test_a_peer_that_is_missing_or_of_another_version_is_a_gap() -> None:
    assert peer("torch", None).gap() is None
    assert peer("torch", metadata.version("torch")).gap() is None
    assert "torch 0.1 is asked for" in str(peer("torch", "0.1").gap())
    assert peer("no-such-quantizer", "1.0").gap() == "no-such-quantizer is not installed"


def test_peers_are_asked_only_for_bits_that_they_have() -> None:
    offered = {name: [bits for bits, widths in SETTINGS.items() if peer.offers(widths)] for name, peer in PEERS.items()}
    assert offered["nncf"] == ["W8A8"]
    assert offered["ort_min_max"] == ["W8A8", "W4A8"]
    assert offered["torchao"] == offered["brevitas_gptq"] == ["W8A8", "W4A8", "W4A4", "W3A3", "W2A4"]


def test_the_page_tells_drops_differences_costs_and_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = recipe_file(tmp_path), tmp_path / "page.md"
    points: list[Point] = []

    def note(arguments: object, work: object, phases: list[list[Point]], page: object, **_: object) -> int:
        points.extend(point for phase in phases for point in phase)
        return 0

    monkeypatch.setattr("scripts.compare_quantization.carry_out", note)
    words = [str(file), "--out", str(out), "--seeds", "0", "1", "--methods", "static", "ort_min_max", "nncf", "lsq"]
    words += ["--settings", "W8A8", "W2A2"]
    main([*words, "--known-only"])
    monkeypatch.undo()
    asked = [(point["method"], point.get("bits"), point["seed"]) for point in points]
    assert ("static", "W8A8", 1) in asked
    assert ("static", "W2A2", 0) not in asked
    assert [one for one in asked if one[0] == "lsq"] == [("lsq", "W8A8", 0), ("lsq", "W2A2", 0)]

    quality = {"original": (0.8, 0.9), "static": (0.76, 0.81), "ort_min_max": (0.72, 0.72), "lsq": (0.6,)}
    environment = {"torch": "2", "gpu": None, "isa": "AVX2"}
    for point in points:
        method, seed = point["method"], point["seed"]
        if method in quality:
            costs = {"bytes": 12_000 + 2000 * seed, "ratio": 0.5, "seconds": 3.0}
            append_row(
                out.with_suffix(".jsonl"),
                {"point": point, "result": {"quality": quality[method][seed], **costs}, "environment": environment},
            )
    assert all(point in Rows(out.with_suffix(".jsonl")) for point in points if point["method"] in quality)
    assert main([*words, "--known-only"]) == 0
    text = out.read_text()
    assert text == capsys.readouterr().out[:-1]
    assert "Uncompressed: 85.00 % on test, mean of 2 seeds; a file of 13 kB." in text
    # Drops are 5 and 10 % against 10 and 20 %: the differences -5 and -10 have the mean -7.5 and the half-width 31.77.
    assert "| `static` | **7.50 %** (-39.27 to +24.27) | - |" in text
    assert "| `ort_min_max` | 15.00 % | - |" in text
    assert "| `lsq` | 25.00 % | 25.00 % |" in text
    assert "| `static` | 13 | - |" in text
    assert "| `lsq` | 0.50 | 0.50 |" in text
    assert "No rows: nncf is not installed." in text or "No rows: not computed." in text


@pytest.mark.slow
def test_onnxruntimes_quantizer_is_held_against_ours_on_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    words = [str(recipe_file(tmp_path)), "--out", str(out), "--seeds", "0", "--methods", "static", "ort_min_max"]
    assert main([*words, "--settings", "W8A8", "W4A8"]) == 0
    rows = {
        (row["point"]["method"], row["point"].get("bits")): row["result"]
        for row in read_rows(out.with_suffix(".jsonl"))
    }
    assert set(rows) == {("original", None), *((m, b) for m in ("static", "ort_min_max") for b in ("W8A8", "W4A8"))}
    original = rows["original", None]
    for method in ("static", "ort_min_max"):
        fine, coarse = rows[method, "W8A8"], rows[method, "W4A8"]
        assert abs(fine["quality"] - original["quality"]) < 0.02
        assert coarse["bytes"] < fine["bytes"] < original["bytes"]
        assert fine["ratio"] > 0
