"""``mil doctor``: checks the machine, the packages, the data and the folders, and says how to mend what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import typer


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        state: Broken means that nothing will work before it is mended.
        subject: What was checked.
        text: What was found.
        remedy: What to do, if anything.
    """

    state: State
    subject: str
    text: str
    remedy: str = ""


def doctor() -> int:
    """Check this machine, the packages and the data, and say how to mend what is missing."""
    broken = False
    for finding in findings():
        typer.echo(f"{finding.state.value:<7} {finding.subject:<12} {finding.text}")
        if finding.remedy:
            typer.echo(f"{'':<20} -> {finding.remedy}")
        broken = broken or finding.state is State.BROKEN
    return 2 if broken else 0


def findings() -> Iterator[Finding]:
    """Yield what each check finds."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_packages,
        check_machine,
        check_data,
        check_cache,
        check_folder,
    )
    for check in checks:
        yield from check()


def check_python() -> Iterator[Finding]:
    """Check Python's version."""
    import platform
    import sys

    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        yield Finding(State.OK, "python", version)
    else:
        yield Finding(State.BROKEN, "python", f"{version} is not supported", "use Python 3.11, 3.12 or 3.13")


def check_packages() -> Iterator[Finding]:
    """Check that every package that the tool needs is there in a version that it takes, and can be imported."""
    from importlib import import_module, metadata

    from packaging.requirements import Requirement

    present, bad = [], False
    for text in metadata.requires("mil-cli") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            bad = True
            yield Finding(State.BROKEN, "packages", f"{requirement.name} is not installed", install)
            continue
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            bad = True
            yield Finding(State.BROKEN, "packages", f"{requirement.name} {version} is too old or too new", install)
        present.append(f"{requirement.name} {version}")
    for module in ("torch", "onnxruntime", "onnx", "hydra"):
        try:
            import_module(module)
        except Exception as error:
            bad = True
            hint = f"reinstall it: pip install --force-reinstall {module}"
            yield Finding(State.BROKEN, "packages", f"{module} cannot be imported: {error}", hint)
    if not bad:
        yield Finding(State.OK, "packages", ", ".join(present))


def check_machine() -> Iterator[Finding]:
    """Show the processor's instruction sets, the cores and the thread count."""
    import os

    import psutil
    import torch

    cores = psutil.cpu_count(logical=False) or 1
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(State.OK, "processor", f"{cores} cores, {capability}; {_int8_text()}")
    threads = torch.get_num_threads()
    chosen = os.environ.get("OMP_NUM_THREADS")
    text = f"training uses {threads}" + (f" (OMP_NUM_THREADS={chosen})" if chosen else "")
    if threads > cores:
        yield Finding(State.NOTE, "threads", text, f"set OMP_NUM_THREADS={cores}: more threads than cores are slower")
    else:
        yield Finding(State.OK, "threads", text)
    memory = psutil.virtual_memory()
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free"
    if memory.available < 1.5e9:
        yield Finding(State.NOTE, "memory", text, "close other programs: training needs about 1.5 GB")
    else:
        yield Finding(State.OK, "memory", text)


def _int8_text() -> str:
    from mil_cli.device.host import isa_flags

    found = sorted(isa_flags() & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
    if found:
        return f"int8 instructions: {', '.join(found)}"
    return "no int8 instructions: int8 models gain less here"


def check_data() -> Iterator[Finding]:
    """Check which built-in data sets, and which data of the recipes that ship, are here."""
    from mil_cli.data import photographs, speech
    from mil_cli.data.fashion_mnist import DEBIAN_FOLDER

    yield Finding(State.OK, "data", "digits (embedded in scikit-learn)")
    if (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file():
        yield Finding(State.OK, "data", f"fashion_mnist in {DEBIAN_FOLDER}")
    else:
        remedy = "apt-get install dataset-fashion-mnist, or data.root=FOLDER with the four IDX .gz files"
        yield Finding(State.NOTE, "data", "fashion_mnist is not installed", remedy)
    if missing := speech.missing_packages():
        remedy = f"apt-get install {' '.join(missing)}, or data.root=FOLDER with a folder of WAV files for each voice"
        yield Finding(State.NOTE, "data", "the clips of audio_denoising and speech_recognition are not here", remedy)
    else:
        yield Finding(State.OK, "data", f"speech of the packages {', '.join(speech.PACKAGES)}")
    if missing := photographs.missing_packages():
        remedy = f"apt-get install {' '.join(missing)}, or data.root=FOLDER with images in train, val and test"
        yield Finding(State.NOTE, "data", "the photographs of hrnet, pynet and super_resolution are not here", remedy)
    else:
        yield Finding(State.OK, "data", f"photographs of the packages {', '.join(photographs.PACKAGES)}")


def check_cache() -> Iterator[Finding]:
    """Check that the stage cache can be written, and show its size."""
    import shutil

    from mil_cli.events import SilentProgress
    from mil_cli.run.cache import Cache, default_location

    location = default_location()
    problem = _cannot_write(location)
    if problem:
        yield Finding(State.BROKEN, "cache", f"{location}: {problem}", "set MIL_CACHE to a folder that you may write")
        return
    entries = Cache(location, SilentProgress()).entries()
    size = sum(entry.size_bytes for entry in entries)
    free = shutil.disk_usage(location if location.is_dir() else _existing(location)).free
    text = f"{len(entries)} entries, {size / 1e6:.1f} MB in {location}; {free / 1e9:.1f} GB free on its disk"
    if free < 1e9:
        yield Finding(State.NOTE, "cache", text, "mil cache --clear --older-than 30 frees what was long not used")
    else:
        yield Finding(State.OK, "cache", text)


def check_folder() -> Iterator[Finding]:
    """Check that runs can be written where the command is run."""
    here = Path.cwd()
    problem = _cannot_write(here)
    if problem:
        yield Finding(State.NOTE, "folder", f"{here}: {problem}", "run elsewhere, or give --out a folder")
    else:
        yield Finding(State.OK, "folder", f"runs go to {here / 'runs'}")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())


def _cannot_write(folder: Path) -> str:
    """Return why a file cannot be made in `folder` (or where it would be made), or ``""``."""
    import tempfile

    if folder.exists() and not folder.is_dir():
        return "a file is in the way"
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)
