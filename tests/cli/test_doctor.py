"""`mil doctor`: what it finds, and that it says how to mend what is broken."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from mil_cli.cli import doctor
from mil_cli.cli.doctor import State
from mil_cli.cli.main import main


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for subject in ("python", "packages", "processor", "threads", "memory", "data", "cache", "folder"):
        assert f" {subject} " in shown
    assert str(private_cache) in shown
    assert "broken" not in shown


@pytest.mark.parametrize(
    ("requirement", "expected"), [("nothing-of-this-name>=1", "not installed"), ("torch<2", "too")]
)
def test_a_package_that_is_missing_or_of_the_wrong_version(
    requirement: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: [requirement])
    (finding,) = doctor.check_packages()
    assert finding.state is State.BROKEN
    assert expected in finding.text
    assert finding.remedy == f"pip install '{requirement}'"


def test_a_missing_data_set_is_no_fault_and_names_the_apt_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mil_cli.data.fashion_mnist.DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr("mil_cli.data.speech.DEBIAN_FOLDER", tmp_path / "none")
    digits, fashion, speech, _ = doctor.check_data()
    assert digits.state is State.OK
    assert fashion.state is State.NOTE
    assert "apt-get install dataset-fashion-mnist" in fashion.remedy
    assert speech.state is State.NOTE
    assert "apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-es-wav" in speech.remedy


def test_a_cache_that_cannot_be_written(private_cache: Path) -> None:
    private_cache.write_text("in the way")
    (finding,) = doctor.check_cache()
    assert finding.state is State.BROKEN
    assert "MIL_CACHE" in finding.remedy


def test_more_threads_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 512)
    findings = {finding.subject: finding for finding in doctor.check_machine()}
    assert findings["threads"].state is State.NOTE
    assert "OMP_NUM_THREADS=" in findings["threads"].remedy
