"""`mil --help` is quick because it imports nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "hydra", "omegaconf", "onnx", "onnxruntime", "numpy", "scipy", "sklearn", "psutil", "jinja2"}


def loaded_after(*arguments: str) -> set[str]:
    code = (
        "import sys, json\nfrom mil_cli.cli.main import main\n"
        f"main({list(arguments)!r})\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.rpartition("MODULES")[2]))


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("-h",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not loaded_after(*arguments) & {*HEAVY, "pydantic"}


@pytest.mark.parametrize(
    "arguments", [("compress", "--help"), ("list",), ("list", "stages"), ("nonsense",), ("compress", "missing.yaml")]
)
def test_light_verbs_import_no_torch(arguments: tuple[str, ...]) -> None:
    # Typer itself reads a verb's arguments with pydantic, and a recipe is composed by Hydra.
    assert not loaded_after(*arguments) & ({"torch"} if "missing.yaml" in arguments else HEAVY)


def test_help_answers_quickly() -> None:
    command = [sys.executable, "-m", "mil_cli", "--help"]
    subprocess.run(command, capture_output=True, check=True)
    spent = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True, env=os.environ)
        after = os.times()  # of the processor, which other work beside does not prolong
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.4
