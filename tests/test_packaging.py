"""The wheel holds configs and recipes, and works on a user's folder outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with hatchling's own entry point: no network, no isolated environment."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_shipped_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "recipes"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"mil_cli/_{folder}/{file.relative_to(ROOT / folder)}" in names
    assert "mil_cli/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("__pycache__" in name or name.startswith("tests/") for name in names)


def test_constraints_pin_every_dependency() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = version
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), text
    assert pins["torch"] == "2.13.0"


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "mil_cli"]

    def run(*arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "site/mil_cli/_recipes/quickstart.yaml" in run("list", "recipes", cwd=tmp_path)
    run("init", "mine", cwd=tmp_path)
    run("compress", "recipe.yaml", "--out", "run", cwd=tmp_path / "mine")
    report = json.loads((tmp_path / "mine/run/report.json").read_text())
    assert report["goals_met"] is True
