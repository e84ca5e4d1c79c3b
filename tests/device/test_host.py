from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from mil_cli.device.host import Host, check, detect, isa_flags, resolve
from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import DeviceError

CONFIGS = Path(__file__).parents[2] / "configs" / "device"


def shipped(name: str) -> dict[str, object]:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("machine", "activations", "reduce_range"),
    [
        ("avx2", "uint8", True),
        ("bare", "uint8", True),
        ("vnni", "uint8", False),
        ("client_vnni", "uint8", False),
        ("arm", "int8", False),
    ],
)
def test_int8_form_follows_the_instruction_set(
    hosts: dict[str, Host], machine: str, activations: str, reduce_range: bool
) -> None:
    profile = resolve(shipped("host_cpu"), host=hosts[machine])
    assert profile.int8.activations == activations
    assert profile.int8.reduce_range is reduce_range
    assert profile.description == f"a {machine} processor"
    assert set(profile.requires.isa) <= hosts[machine].isa


def test_what_the_user_sets_is_not_detected(hosts: dict[str, Host]) -> None:
    config = {**shipped("host_cpu"), "int8": {"reduce_range": False, "activations": None, "per_channel": False}}
    form = resolve(config, host=hosts["avx2"]).int8
    assert (form.activations, form.reduce_range, form.per_channel) == ("uint8", False, False)


def test_a_name_alone_is_a_whole_profile(hosts: dict[str, Host]) -> None:
    assert resolve({"name": "host_cpu"}, host=hosts["vnni"]) == resolve(shipped("host_cpu"), host=hosts["vnni"])


def test_fixed_profiles_need_their_instruction_set(hosts: dict[str, Host]) -> None:
    for machine in hosts:
        assert resolve(shipped("avx2"), host=hosts[machine], runnable=False).int8.reduce_range
        assert not resolve(shipped("avx512_vnni"), host=hosts[machine], runnable=False).int8.reduce_range
    assert check(resolve(shipped("avx2"), host=hosts["vnni"]), host=hosts["vnni"]) == []
    with pytest.raises(
        DeviceError, match="lacks the instruction set avx512f; the instruction set avx512_vnni"
    ) as caught:
        resolve(shipped("avx512_vnni"), host=hosts["avx2"])
    assert caught.value.hint is not None
    assert "host_cpu" in caught.value.hint


def test_lacking_packages_providers_and_remotes_are_named(hosts: dict[str, Host]) -> None:
    config = {
        "name": "board",
        "provider": "NoSuchExecutionProvider",
        "remote": "board.local",
        "requires": {"packages": ["onnxruntime>999", "no-such-package-here", "numpy>=1", "not a package!"]},
    }
    lacks = check(resolve(config, host=hosts["avx2"], runnable=False), host=hosts["avx2"])
    assert len(lacks) == 5
    assert "is installed)" in lacks[0]
    assert "no-such-package-here" in lacks[1]
    assert "not a package!" in lacks[2]
    assert "board.local" in lacks[3]
    assert "NoSuchExecutionProvider" in lacks[4]


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({"thread": 2}, "device.thread", "did you mean 'threads'"),
        ({"int8": {"reduce_rnge": True}}, "device.int8.reduce_rnge", "did you mean 'reduce_range'"),
        ({"threads": 0}, "device.threads", "greater than or equal to 1"),
        ({"threads": "many"}, "device.threads", "valid integer"),
        ({"int8": "yes"}, "device.int8", "dictionary"),
        ({"int8": {"activations": "uint4"}}, "device.int8.activations", "'uint8' or 'int8'"),
        ({"watts": -3}, "device.watts", "greater than 0"),
        ({"price_per_hour": float("inf")}, "device.price_per_hour", "finite"),
        ({"preferred_multiple": {"float": 0}}, "device.preferred_multiple.float", "greater than or equal to 1"),
        ({"weight_bits": [9]}, "device.weight_bits.0", "less than or equal to 8"),
        ({"weight_bits": []}, "device.weight_bits", "at least one width"),
        ({"version": 2}, "device.version", "must be 1"),
    ],
)
def test_wrong_settings_are_explained(hosts: dict[str, Host], config: dict[str, object], key: str, words: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve({"name": "host_cpu", **config}, host=hosts["avx2"])
    assert caught.value.where == key
    assert words in str(caught.value)


def test_all_wrong_settings_are_reported_together(hosts: dict[str, Host]) -> None:
    with pytest.raises(DeviceError, match="3 problems") as caught:
        resolve({"threads": 0, "watts": "x"}, host=hosts["avx2"])
    for key in ("device.name", "device.threads", "device.watts"):
        assert key in str(caught.value)


def test_shipped_profiles_resolve_and_open_with_a_comment() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {"host_cpu", "avx2", "avx512_vnni"} <= {file.stem for file in files}
    for file in files:
        assert file.read_text(encoding="utf-8").startswith("# ")
        profile = resolve(shipped(file.stem), runnable=False)
        assert profile.name == file.stem
        assert DeviceProfile.model_validate(profile.model_dump(mode="json")) == profile


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: x\nflags\t\t: fpu avx2 avx512_vnni\n\nflags\t\t: other\n",
            {"avx2", "avx512_vnni", "fpu"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("nothing of use\n", set()),
    ],
)
def test_flags_are_read_as_linux_lists_them(tmp_path: Path, text: str, expected: set[str]) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text, encoding="utf-8")
    assert isa_flags(file) == expected


def test_detection_agrees_with_the_system() -> None:
    host = detect()
    assert host.memory_bytes == psutil.virtual_memory().total
    assert 1 <= host.cores <= host.logical_cores == os.cpu_count()
    assert {"onnxruntime", "numpy"} <= set(host.packages)


def test_profiles_are_known_without_torch() -> None:
    code = "import sys, mil_cli.device.host, mil_cli.device.profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
