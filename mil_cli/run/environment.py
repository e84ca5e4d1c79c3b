"""What a result depends on beside its inputs: versions, thread count and instruction set; and `environment.json`."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from functools import cache
from importlib import metadata

import mil_cli
from mil_cli.run.processes import place
from mil_cli.stages.registry import StageConfig, function_of

PACKAGES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "lightning-fabric",
    "torchmetrics",
    "numpy",
    "scipy",
    "scikit-learn",
)
"""Packages whose version can change a figure."""


@cache
def versions() -> dict[str, str]:
    """Return the versions of this tool, Python and the packages that can change a figure."""
    found = {"mil": mil_cli.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = metadata.version(package)
    return found


def computing_environment() -> dict[str, object]:
    """Return what changes the bits of a training on this machine: threads, processes, instruction set, versions."""
    import torch

    return {
        "mil": mil_cli.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": place().count,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def code_fingerprint(config: StageConfig) -> str:
    """Return the SHA-256 of the module that implements the stage of `config`."""
    source = inspect.getsource(sys.modules[function_of(config).__module__])
    return hashlib.sha256(source.encode()).hexdigest()


def describe() -> dict[str, object]:
    """Return what `environment.json` and the report say of this machine; no names or paths of its owner."""
    import psutil

    return {
        "versions": versions(),
        "computing": computing_environment(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
