"""Every command in the README works: each is parsed by the quick test, and the blocks are run by the slow one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BASH = [block for kind, block in BLOCKS if kind == "bash"]
COMMANDS = [line for block in BASH for line in block.splitlines() if line]
MIL = sorted({line for line in COMMANDS if line.startswith("mil ")})
MAKE = sorted({line for line in COMMANDS if line.startswith("make ")})


def test_the_readme_has_commands() -> None:
    assert len(MIL) >= 10
    assert {"make demo", "make test"} <= set(MAKE)


@pytest.mark.parametrize("line", MIL)
def test_verb_and_options_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0].startswith("-"):
        return
    done = subprocess.run(
        [sys.executable, "-m", "mil_cli", words[0], "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for word in words[1:]:
        if word.startswith("-"):
            assert word in done.stdout


@pytest.mark.parametrize("line", MAKE)
def test_make_target_exists(line: str) -> None:
    subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, check=True, capture_output=True)


def test_files_that_it_names_are_there() -> None:
    for name in re.findall(r"`(recipes/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((\w[\w.]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    script = ["set -eu"]
    for kind, block in BLOCKS:
        if kind == "python":
            script.append(f"python - <<'END'\n{block}END")
            continue
        lines = [line for line in block.splitlines() if not line.startswith(("make ", "source "))]
        script += lines
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
