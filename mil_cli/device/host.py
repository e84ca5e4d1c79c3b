"""What this machine is, and profiles resolved and checked against it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from pydantic import ValidationError

from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import DeviceError, did_you_mean

CPUINFO = Path("/proc/cpuinfo")

HOST = "host_cpu"
"""The profile whose requirements are what was detected here."""

PACKAGES = ("onnxruntime", "onnx", "numpy")
"""Packages whose versions belong to a measurement."""

_INT8_X86 = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
_SHOWN = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimd", "asimddp", "i8mm")
_APPLE_NAMES = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "AdvSIMD": "asimd", "avx2_0": "avx2"}


@dataclass(frozen=True)
class Host:
    """Facts of a machine.

    Attributes:
        isa: Names of the instruction sets, as Linux' ``/proc/cpuinfo`` writes them.
        processor: The processor's name; empty if it is not known.
        architecture: Such as ``x86_64`` or ``aarch64``.
        cores: Physical cores.
        logical_cores: Hardware threads.
        memory_bytes: Main memory, in bytes.
        packages: Package -> version, for the packages that a measurement depends on.
    """

    isa: frozenset[str]
    processor: str
    architecture: str
    cores: int
    logical_cores: int
    memory_bytes: int
    packages: Mapping[str, str]


def detect() -> Host:
    """Return the facts of this machine."""
    packages = {}
    for package in PACKAGES:
        version = _version(package)
        if version is not None:
            packages[package] = version
    logical = psutil.cpu_count() or 1
    return Host(
        isa=frozenset(isa_flags()),
        processor=_processor_name(),
        architecture=platform.machine(),
        cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        memory_bytes=psutil.virtual_memory().total,
        packages=packages,
    )


def isa_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """Return the names of this processor's instruction sets; empty where they cannot be read.

    Args:
        cpuinfo: The file that Linux lists them in.
    """
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return set(value.split())
        return set()
    return _apple_flags()


def _apple_flags() -> set[str]:
    if platform.system() != "Darwin":
        return set()
    listing = subprocess.run(["/usr/sbin/sysctl", "hw.optional"], capture_output=True, text=True, check=False).stdout
    found = set()
    for line in listing.splitlines():
        key, _, value = line.partition(":")
        name = _APPLE_NAMES.get(key.rpartition(".")[2])
        if name is not None and value.strip() == "1":
            found.add(name)
    return found


def _processor_name(cpuinfo: Path = CPUINFO) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def int8_form(host: Host) -> dict[str, Any]:
    """Return the int8 form that suits a machine's instruction sets.

    x86 multiplies unsigned by signed bytes. Without VNNI it adds the products in 16 bits, which saturate, so weights
    keep to 7 bits there; with VNNI or AMX the sums are of 32 bits. ARM multiplies signed bytes with 32-bit sums.
    """
    if host.architecture.lower() in ("arm64", "aarch64"):
        return {"activations": "int8", "weights": "int8", "reduce_range": False, "per_channel": True}
    reduced = not host.isa & _INT8_X86
    return {"activations": "uint8", "weights": "int8", "reduce_range": reduced, "per_channel": True}


def filled(config: Mapping[str, Any], host: Host) -> dict[str, Any]:
    """Return a profile's settings with what was left open (missing or null) filled in from `host`.

    Args:
        config: The settings as composed.
        host: The machine.
    """
    content = dict(config)
    int8 = content.get("int8")
    if int8 is None or isinstance(int8, Mapping):
        given = {key: value for key, value in (int8 or {}).items() if value is not None}
        content["int8"] = {**int8_form(host), **given}
    if content.get("name") == HOST and not content.get("requires"):
        content["requires"] = {"isa": [name for name in _SHOWN if name in host.isa]}
    if content.get("name") == HOST and not content.get("description"):
        content["description"] = host.processor or host.architecture
    return {key: value for key, value in content.items() if value is not None}


def resolve(config: Mapping[str, Any], *, host: Host | None = None, runnable: bool = True) -> DeviceProfile:
    """Return the profile of a composed configuration, what it leaves open filled in from the machine.

    Args:
        config: The settings of a file in the config group ``device``, overrides applied.
        host: The machine; None detects this one.
        runnable: Whether the machine must be able to run on the profile; False is for exporting to another one.

    Raises:
        DeviceError: The settings are not a profile, or the machine lacks what it requires.
    """
    host = detect() if host is None else host
    content = filled(config, host)
    try:
        profile = DeviceProfile.model_validate(content)
    except ValidationError as error:
        raise _as_device_error(error) from None
    if runnable:
        lacks = check(profile, host=host)
        if lacks:
            raise DeviceError(
                f"this machine cannot run on the device profile '{profile.name}': it lacks {'; '.join(lacks)}",
                where="device",
                hint=f"choose another profile, such as {HOST} (`mil list devices` shows them)",
            )
    return profile


def check(profile: DeviceProfile, *, host: Host | None = None) -> list[str]:
    """Return what a machine lacks to run on a profile; empty if nothing.

    Args:
        profile: The profile.
        host: The machine; None detects this one.
    """
    host = detect() if host is None else host
    lacks = [f"the instruction set {name}" for name in profile.requires.isa if name not in host.isa]
    for text in profile.requires.packages:
        lacks.extend(_package_problem(text))
    if profile.remote is not None:
        lacks.append(f"a way to reach the remote device {profile.remote!r} (models are measured on this machine only)")
    lacks.extend(_provider_problem(profile.provider))
    return lacks


def _package_problem(text: str) -> list[str]:
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return [f"a package that can be read from {text!r} (write it as pip does, onnxruntime>=1.20)"]
    version = _version(requirement.name)
    if version is None:
        return [f"the package {text}"]
    if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return [f"the package {text} ({version} is installed)"]
    return []


def _provider_problem(provider: str) -> list[str]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider in available:
        return []
    return [f"onnxruntime's {provider} ({did_you_mean(provider, available)})"]


def _as_device_error(error: ValidationError) -> DeviceError:
    problems = []
    for finding in error.errors():
        key = ".".join(["device", *(str(part) for part in finding["loc"])])
        if finding["type"] == "extra_forbidden":
            hint = did_you_mean(str(finding["loc"][-1]), _siblings(finding["loc"]))
            problems.append(DeviceError("there is no such key", where=key, value=finding["input"], hint=hint))
        elif finding["type"] == "missing":
            problems.append(DeviceError("a value is needed here", where=key, hint=f"set {key}"))
        else:
            what = (
                finding["msg"]
                .removeprefix("Value error, ")
                .replace("Input should", "must")
                .replace("String should", "must")
            )
            problems.append(DeviceError(what, where=key, value=finding["input"], hint=f"change {key}"))
    if len(problems) == 1:
        return problems[0]
    listing = "\n".join(f"  {problem}" for problem in problems)
    return DeviceError(f"{len(problems)} problems in the device profile\n{listing}", where="device")


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    fields = DeviceProfile.model_fields
    for part in location[:-1]:
        annotation = fields[str(part)].annotation if str(part) in fields else None
        fields = getattr(annotation, "model_fields", {})
    return list(fields)
