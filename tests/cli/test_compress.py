"""`mil compress` on a tiny project: exit codes, what is written where, the plan, sweeps, showing a run again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mil_cli.cli.main import main

Project = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def test_run_report_and_the_single_verbs(project: Project, capsys: Capture) -> None:
    project()
    assert main(["compress", "recipe.yaml", "--out", "run"]) == 0
    first = capsys.readouterr()
    assert "the goal is met" in first.out
    assert "run/model.onnx" in first.out
    assert "quantize" in first.err
    for name in ("recipe.yaml", "report.json", "report.html", "model.onnx", "model.pt2", "baseline.onnx"):
        assert (Path("run") / name).is_file(), name
    report = json.loads(Path("run/report.json").read_text())
    assert report["goals_met"] is True
    assert report["stages"][0]["cached"] is False

    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == first.out

    assert main(["export", "run/model.pt2", "-o", "again.onnx"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert Path("again.onnx").read_bytes() == Path("run/model.onnx").read_bytes()

    assert main(["inspect", "run/model.pt2"]) == 0
    assert "conv2d" in capsys.readouterr().out
    assert main(["inspect", "run/model.onnx"]) == 0
    assert "QuantizeLinear" in capsys.readouterr().out
    assert main(["inspect", "recipe.yaml"]) == 0
    assert "8 of 8" in capsys.readouterr().out

    # A run of the resolved recipe that was written down takes everything from the cache.
    assert main(["compress", "recipe.yaml", "--out", "second"]) == 0
    assert json.loads(Path("second/report.json").read_text())["stages"][0]["cached"] is True
    assert Path("second/model.onnx").read_bytes() == Path("run/model.onnx").read_bytes()


def test_a_missed_goal_is_3_and_everything_is_written(project: Project, capsys: Capture) -> None:
    project()
    assert main(["compress", "recipe.yaml", "goals.size.max_ratio=0.001"]) == 3
    assert "missed" in capsys.readouterr().out
    (run,) = [path for path in Path("runs/recipe").iterdir() if not path.is_symlink()]
    assert (Path("runs/recipe/latest")).resolve() == run.resolve()
    assert (run / "model.onnx").is_file()
    assert json.loads((run / "report.json").read_text())["goals_met"] is False


def test_plan_writes_nothing(project: Project, capsys: Capture) -> None:
    folder = project()
    before = sorted(path.name for path in folder.iterdir())
    assert main(["compress", "recipe.yaml", "chain=[prune,recover,quantize]", "model.width=32", "--plan"]) == 0
    shown = capsys.readouterr().out
    for name in ("prune/magnitude", "distill/soft_labels", "quantize/static", "64 train"):
        assert name in shown
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_sweep_exits_with_the_worst_of_its_points_and_can_be_shown_again(project: Project, capsys: Capture) -> None:
    project()
    sweep = ["-m", "goals.size.max_ratio=0.001,9"]
    assert main(["compress", "recipe.yaml", *sweep, "--out", "sweep"]) == 3
    shown = capsys.readouterr().out
    outcomes = [json.loads(Path(f"sweep/{number}/point.json").read_text()) for number in range(2)]
    assert [outcome["exit_code"] for outcome in outcomes] == [3, 0]
    assert outcomes[0]["overrides"] == ["goals.size.max_ratio=0.001"]
    assert main(["report", "sweep"]) == 0
    assert capsys.readouterr().out.strip() in shown


@pytest.mark.slow
def test_a_point_that_fails_does_not_stop_the_others(project: Project, capsys: Capture) -> None:
    project()
    sweep = ["-m", "model.width=8,0", "--out", "sweep"]
    assert main(["compress", "recipe.yaml", *sweep]) == 2
    captured = capsys.readouterr()
    outcomes = [json.loads(Path(f"sweep/{number}/point.json").read_text()) for number in range(2)]
    assert [outcome["exit_code"] for outcome in outcomes] == [0, 2]
    assert outcomes[1]["message"]
    assert "point 1 (model.width=0): " in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_parallel_points_share_the_cores(project: Project, capsys: Capture, private_cache: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    project()
    sweep = ["-m", "stages.quantize.observer=min_max,mse", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert main(["compress", "recipe.yaml", *sweep, "--out", "sweep"]) == 0
    capsys.readouterr()
    for number in range(2):
        environment = json.loads(Path(f"sweep/{number}/environment.json").read_text())
        assert environment["computing"]["threads"] <= max(1, environment["cores"] // 2)


@pytest.mark.slow
def test_two_runs_at_once_share_the_cache(project: Project, capsys: Capture) -> None:
    project()
    codes: dict[str, int] = {}
    threads = [threading.Thread(target=lambda name=name: codes.update({name: _run(name)})) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    capsys.readouterr()
    assert codes == {"one": 0, "two": 0}
    assert Path("one/model.onnx").read_bytes() == Path("two/model.onnx").read_bytes()


def _run(name: str) -> int:
    import subprocess
    import sys

    command = [sys.executable, "-m", "mil_cli", "compress", "recipe.yaml", "--out", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode
