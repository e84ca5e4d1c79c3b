"""A sweep of ``mil compress -m``: every point checked first, then run, then joined into one table."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.errors import MilError, OutputError, RecipeError, RecipeErrors

if TYPE_CHECKING:
    from omegaconf import DictConfig

_WORST_FIRST = (130, 1, 2, 3, 0)


def new_directory(parent: Path) -> Path:
    """Make a folder of its own for a sweep, named after the time; another sweep may begin in the same second."""
    stamp = time.strftime("sweep_%Y-%m-%d_%H-%M-%S")
    attempt = 0
    while True:
        folder = parent / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            attempt += 1
        else:
            return folder


def run_sweep(recipe: Path, overrides: Sequence[str], *, out: Path | None, fresh: bool, plan: bool) -> int:
    """Run every point of a sweep and return the worst exit code.

    Args:
        recipe: The recipe's file.
        overrides: Hydra overrides; comma lists and ``range()`` make the points.
        out: The sweep's folder; ``runs/RECIPE/sweep_TIME`` by default.
        fresh: Compute the stages anew.
        plan: Only plan every point.

    Raises:
        RecipeErrors: A point is not valid; nothing has run.
        OutputError: The folder holds points of another sweep.
    """
    from mil_cli.cli import console
    from mil_cli.cli.progress import progress_on
    from mil_cli.recipe.compose import sweep, sweep_points

    progress = progress_on(console.messages())
    points = sweep_points(recipe, overrides)
    if points is not None:
        recipes = _check(recipe, points)
        progress.notice(f"sweep of {len(points)} points")
        if plan:
            from mil_cli.report.plan import render_plan
            from mil_cli.run.plan import plan_recipe

            for point, checked in zip(points, recipes, strict=True):
                stdout = console.results()
                stdout.print(f"point {point.number}: {' '.join(point.overrides)}", markup=False)
                render_plan(plan_recipe(checked, progress=progress), stdout)
            return 0
    elif plan:
        raise RecipeError("this sweeper chooses its points as results come in", hint="plan single points, without -m")

    directory = out or new_directory(Path("runs") / recipe.stem)
    if points is not None:
        _refuse_other_points(directory, {str(point.number) for point in points})
    sweep(recipe, overrides, Point(path=recipe.absolute(), fresh=fresh), directory=directory)

    from mil_cli.report.sweep import render_sweep

    stdout = console.results()
    render_sweep(directory, stdout)
    stdout.print(f"\n{directory}", markup=False)
    codes = _exit_codes(directory, progress.notice)
    return next((code for code in _WORST_FIRST if code in codes), 1)


def _check(path: Path, points: Sequence[Any]) -> list[Any]:
    from mil_cli.recipe.load import build_recipe

    recipes, problems = [], {}
    for point in points:
        try:
            recipes.append(build_recipe(point.content, path=path))
        except RecipeErrors as error:
            problems.update({str(problem): problem for problem in error.problems})
    if problems:
        raise RecipeErrors(list(problems.values()), where=str(path))
    return recipes


def _refuse_other_points(directory: Path, names: Collection[str]) -> None:
    """Refuse a folder with points of another sweep, which would count as this one's.

    Raises:
        OutputError: Names them.
    """
    from mil_cli.report.sweep import POINT_FILE

    others = sorted(file.parent.name for file in directory.glob(f"*/{POINT_FILE}") if file.parent.name not in names)
    if others:
        hint = "remove their folders, or give another --out"
        raise OutputError(
            "the folder holds points of another sweep", where=str(directory), value=", ".join(others), hint=hint
        )


def _exit_codes(directory: Path, notice: Any) -> set[int]:
    import json

    from mil_cli.report.sweep import POINT_FILE

    codes = set()
    for file in sorted(directory.glob(f"*/{POINT_FILE}"), key=lambda path: path.parent.name.zfill(9)):
        outcome = json.loads(file.read_text(encoding="utf-8"))
        codes.add(int(outcome["exit_code"]))
        if outcome["message"]:
            notice(f"point {file.parent.name} ({' '.join(outcome['overrides'])}): {outcome['message']}")
    return codes


@dataclass(frozen=True)
class Point:
    """Runs one point of a sweep; picklable, so that a launcher may send it to another process.

    Attributes:
        path: The recipe's file.
        fresh: Compute the stages anew.
    """

    path: Path
    fresh: bool

    def __call__(self, config: DictConfig) -> int:
        """Run the point and return its exit code, which is also written into its folder."""
        from hydra.core.hydra_config import HydraConfig

        from mil_cli.cli import console
        from mil_cli.cli.crash import write_traceback
        from mil_cli.cli.progress import progress_on
        from mil_cli.files import write_json
        from mil_cli.recipe.compose import plain, shown
        from mil_cli.recipe.load import build_recipe
        from mil_cli.report.html import write_html
        from mil_cli.report.sweep import POINT_FILE

        job = HydraConfig.get()
        overrides = [shown(override) for override in job.overrides.task]
        directory = Path(job.runtime.output_dir)
        progress = progress_on(console.messages())
        progress.notice(f"point {job.job.num}: {' '.join(overrides)}")
        _cap_threads(job.launcher)
        message = ""
        (directory / POINT_FILE).unlink(missing_ok=True)  # if this one is killed, an earlier outcome is not its own
        try:
            from mil_cli.run.directory import PAGE
            from mil_cli.run.runner import run_recipe

            recipe = build_recipe(plain(config, path=self.path), path=self.path)
            result = run_recipe(recipe, out=directory, fresh=self.fresh, progress=progress)
            write_html(result.report, result.directory / PAGE)
            code = 0 if result.goals_met else 3
        except MilError as error:
            code, message = error.exit_code, str(error)
        except Exception as error:
            code = 1
            message = f"internal error: {type(error).__name__}: {error} ({write_traceback(error)})"
        write_json(directory / POINT_FILE, {"overrides": overrides, "exit_code": code, "message": message})
        return code


def _cap_threads(launcher: Any) -> None:
    """Share the cores among the processes of a parallel launcher, so that they do not fight for them."""
    jobs = launcher.get("n_jobs")
    if jobs is None:
        return
    import psutil
    import torch

    cores = psutil.cpu_count(logical=False) or 1
    parallel = cores if int(jobs) < 0 else max(1, min(int(jobs), cores))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // parallel)))
