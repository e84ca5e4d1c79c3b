from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import compare_predictors


def test_a_table_that_is_all_trained_gives_curves_and_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    depths = np.random.default_rng(0).permutation(30)
    rows = [f"net{row},{depth},{'ab'[row % 2]},{depth / 30}\n" for row, depth in enumerate(depths)]
    (tmp_path / "table.csv").write_text("id,depth,op,quality\n" + "".join(rows))
    monkeypatch.setattr(compare_predictors, "PREDICTORS", {"ridge": compare_predictors.Ridge()})
    numbers = ["--sizes", "8", "--repeats", "2", "--trainings", "12"]
    options = ["--features", "depth", "--categories", "op", *numbers, "--out"]
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "table.csv"), *options, str(tmp_path / "found.json")])
    compare_predictors.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["architectures"] == found["rows"] == 30
    (point,) = found["ranking"]["ridge"]["curve"]
    assert point["trained"] == 8
    assert point["tau"]["value"] > 0.8
    assert set(found["search"]) == {"expected_improvement", "upper_bound", "rank_uncertainty", "thompson", "random"}
    assert found["search"]["expected_improvement"]["short"] == 0 < found["search"]["random"]["short"]
