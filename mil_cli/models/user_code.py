"""Imports user code from the recipe's folder: resolves and calls `_target_`, and fingerprints what was imported."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from mil_cli.errors import MilError, did_you_mean
from mil_cli.models.imports import local_sources

_LOADED_SHA256 = "__mil_source_sha256__"


@contextmanager
def importable(root: Path) -> Iterator[None]:
    """Make the modules in the folder `root` importable, and undo it afterwards.

    Modules of the same name that come from elsewhere (the folder of another recipe) are forgotten, so that they are
    imported from here; who holds them keeps them. Modules of `root` whose file has changed since they were imported
    are imported anew. No bytecode is written beside the user's files. Code that imports lazily needs the context to be
    open when it runs.

    Args:
        root: The recipe's folder.
    """
    root = root.resolve()
    _forget_foreign(root)
    _forget_stale(root)
    wrote_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _mark_loaded(root)
        sys.dont_write_bytecode = wrote_bytecode
        if str(root) in sys.path:
            sys.path.remove(str(root))


def user_modules(root: Path) -> dict[str, Path]:
    """Return name and source file of every loaded module that lives in the folder `root`.

    Installed packages (a virtual environment inside the folder) and this package are not user code.
    """
    root = root.resolve()
    package = Path(__file__).resolve().parent.parent
    inside = f"{root}{os.sep}"
    found: dict[str, Path] = {}
    for name, module in list(sys.modules.items()):
        # By text first: there are thousands of modules, and resolving a path asks the file system.
        if not str(getattr(module, "__file__", None)).startswith(inside):
            continue
        path = _source_file(module)
        if path is None or not path.is_relative_to(root) or path.is_relative_to(package):
            continue
        if _is_installed(path.relative_to(root)):
            continue
        found[name] = path
    return found


def user_code_fingerprint(root: Path) -> str:
    """Return the SHA-256 over the sources of every module imported from the folder `root` (paths relative to it)."""
    root = root.resolve()
    digest = hashlib.sha256()
    for path in sorted(set(user_modules(root).values())):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def locate(target: str, *, where: str, error: type[MilError]) -> Any:
    """Import what a dotted path names.

    Args:
        target: Dotted path such as ``my_model.build``.
        where: The recipe key, for messages.
        error: The error class to raise.

    Returns:
        The object.

    Raises:
        MilError: Of class `error`: no such module or attribute, or the module's own import fails.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if not parts or not all(part.isidentifier() for part in parts):
        raise error(
            "not a dotted path to a function or class", where=where, value=target, hint="write it as module.name"
        )
    module, rest = _import_longest(parts, target=target, where=where, error=error)
    found: Any = module
    for position, part in enumerate(rest):
        if not hasattr(found, part):
            inside = ".".join(parts[: len(parts) - len(rest) + position])
            public = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise error(f"'{inside}' has no '{part}'", where=where, value=target, hint=did_you_mean(part, public))
        found = getattr(found, part)
    return found


def call_target(
    config: Mapping[str, Any],
    *,
    root: Path | None,
    where: str,
    error: type[MilError],
    extra: Mapping[str, Any] | None = None,
) -> Any:
    """Call the function or class named by ``_target_`` with the rest of the config as keyword arguments.

    Nested mappings with their own ``_target_`` are built first (``_partial_: true`` gives a function with arguments
    bound), as Hydra's instantiate does.

    Args:
        config: The config, with ``_target_``.
        root: The recipe's folder; its modules are importable during the call. None: only what is importable already.
        where: The recipe key, for messages.
        error: The error class for the user's mistakes.
        extra: More keyword arguments, handed on as they are.

    Returns:
        What the target returns.

    Raises:
        MilError: Of class `error`: nothing of that name, arguments that do not fit, or an exception in the user's code
            (its file and line are given). A `MilError` raised by the target passes through.
    """
    if "_target_" not in config:
        raise error(
            "no _target_ is given",
            where=where,
            value=dict(config),
            hint="name a function or class: _target_: module.name",
        )
    with importable(root) if root is not None else nullcontext():
        return _build(config, where=where, error=error, extra=extra or {})


def locate_in(target: str, *, root: Path, where: str, error: type[MilError]) -> Any:
    """Import what a dotted path names, with the modules of the folder `root` importable; see `locate`."""
    with importable(root):
        return locate(target, where=where, error=error)


def source_line(exception: BaseException, root: Path | None = None) -> str | None:
    """Return ``file:line`` of the innermost frame of a traceback that is the user's, or of the innermost at all."""
    frames = traceback.extract_tb(exception.__traceback__)
    if not frames:
        return None
    resolved = root.resolve() if root is not None else None
    package = Path(__file__).resolve().parent.parent
    for frame in reversed(frames):
        path = Path(frame.filename)
        if resolved is not None and path.is_relative_to(resolved) and not path.is_relative_to(package):
            return f"{path}:{frame.lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def source_sha256(owner: object) -> str:
    """Return the SHA-256 of the source that defines a class or function; of its qualified name where there is none.

    For user code that is the file itself and all files beside it that it imports, directly or through others.
    """
    try:
        found = inspect.getsourcefile(owner)  # type: ignore[arg-type]
    except TypeError:
        found = None
    module = str(getattr(owner, "__module__", ""))
    if found is None or not Path(found).is_file():
        name = f"{module}.{getattr(owner, '__qualname__', repr(owner))}"
        return hashlib.sha256(name.encode()).hexdigest()
    path = Path(found).resolve()
    package = Path(__file__).resolve().parent.parent
    if path.is_relative_to(package) or _is_installed(path):
        return _sha256(path)
    root = path.parents[module.count(".") + (path.name == "__init__.py")]
    return hashlib.sha256("".join(_sha256(source) for source in local_sources(path, root=root)).encode()).hexdigest()


def _build(config: Mapping[str, Any], *, where: str, error: type[MilError], extra: Mapping[str, Any]) -> Any:
    target = config["_target_"]
    function = locate(target, where=f"{where}._target_", error=error)
    if not callable(function):
        raise error("the target is not a function or class", where=f"{where}._target_", value=target)
    arguments = {
        str(key): _build_value(value, where=f"{where}.{key}", error=error)
        for key, value in config.items()
        if key not in ("_target_", "_partial_")
    }
    arguments.update(extra)
    if config.get("_partial_"):
        return functools.partial(function, **arguments)
    _check_arguments(function, arguments, target=target, where=where, error=error)
    try:
        return function(**arguments)
    except MilError:
        raise
    except (Exception, SystemExit) as problem:
        line = source_line(problem)
        raise error(
            f"calling {target} failed: {type(problem).__name__}: {problem}",
            where=where,
            hint=f"raised at {line}" if line else None,
        ) from problem


def _build_value(value: Any, *, where: str, error: type[MilError]) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _build(value, where=where, error=error, extra={})
        return {key: _build_value(item, where=f"{where}.{key}", error=error) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_build_value(item, where=f"{where}[{index}]", error=error) for index, item in enumerate(value)]
    return value


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, target: str, where: str, error: type[MilError]
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in without a signature: the call itself will tell
        return
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    accepted = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in arguments:
            if name not in accepted:
                raise error(
                    f"{target} takes no argument '{name}'",
                    where=f"{where}.{name}",
                    value=arguments[name],
                    hint=did_you_mean(name, accepted) if accepted else "it takes no arguments",
                )
    missing = [
        name
        for name in accepted
        if signature.parameters[name].default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise error(
            f"{target} needs {', '.join(missing)}",
            where=where,
            hint=f"set {', '.join(f'{where}.{m}' for m in missing)}",
        )


def _import_longest(
    parts: Sequence[str], *, target: str, where: str, error: type[MilError]
) -> tuple[ModuleType, Sequence[str]]:
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            return importlib.import_module(name), parts[length:]
        except ModuleNotFoundError as problem:
            absent = problem.name or ""
            if not (name == absent or name.startswith(absent + ".")):
                raise error(
                    f"importing {name} failed: it needs the module '{absent}', which is not installed",
                    where=where,
                    value=target,
                    hint=f"install it (pip install {absent.partition('.')[0]}), or put {absent}.py beside the recipe",
                ) from problem
        except MilError:
            raise
        except (Exception, SystemExit) as problem:  # a script that is no module parses its arguments and exits
            if isinstance(problem, SyntaxError) and problem.filename:
                line: str | None = f"{problem.filename}:{problem.lineno}"
            else:
                line = source_line(problem)
            raise error(
                f"importing {name} failed: {type(problem).__name__}: {problem}",
                where=where,
                value=target,
                hint=f"raised at {line}" if line else None,
            ) from problem
    raise error(
        f"no module '{parts[0]}'",
        where=where,
        value=target,
        hint=f"put {parts[0]}.py beside the recipe, or install the package that holds it",
    )


def _forget_foreign(root: Path) -> None:
    if not root.is_dir():
        return
    own = {entry.stem for entry in root.glob("*.py")} | {entry.parent.name for entry in root.glob("*/__init__.py")}
    for name in own & sys.modules.keys():
        top = sys.modules.get(name)
        path = _source_file(top) if top is not None else None
        protected = name in sys.stdlib_module_names or name in ("mil_cli", "__main__")
        if path is None or path.is_relative_to(root) or protected:
            continue
        _forget(name)
    # Folders without an __init__.py: they have no file, but their modules have.
    for name in ({entry.name for entry in root.iterdir() if entry.is_dir()} - own) & sys.modules.keys():
        inner = [module for key, module in list(sys.modules.items()) if key.startswith(name + ".")]
        files = [path for module in inner if (path := _source_file(module)) is not None]
        of_user = getattr(sys.modules[name], "__file__", None) is None and not any(map(_is_installed, files))
        if of_user and any(not path.is_relative_to(root) for path in files):
            _forget(name)


def _forget(name: str) -> None:
    for key in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
        del sys.modules[key]


def _forget_stale(root: Path) -> None:
    for name, path in user_modules(root).items():
        loaded = getattr(sys.modules[name], _LOADED_SHA256, None)
        if loaded is not None and loaded != _sha256(path):
            # All of the folder's modules go: others may hold names imported from the one that changed.
            for other in user_modules(root):
                if other != "__main__":
                    del sys.modules[other]
            return


def _mark_loaded(root: Path) -> None:
    for name, path in user_modules(root).items():
        module = sys.modules[name]
        if not hasattr(module, _LOADED_SHA256):
            setattr(module, _LOADED_SHA256, _sha256(path))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _source_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    return path if path.is_file() else None


def _is_installed(relative: Path) -> bool:
    return any(part in ("site-packages", "dist-packages") for part in relative.parts)
