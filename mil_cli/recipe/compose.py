"""Hydra composition of a user's recipe file: one configuration, or every point of a sweep.

The recipe's own folder comes first on the search path and wins; the configs that come with the tool follow.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mil_cli.errors import RecipeError, RecipeErrors, did_you_mean
from mil_cli.recipe.locations import configs_folder
from mil_cli.recipe.problems import dotted

_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")

LOGGING_OVERRIDES = ("hydra/job_logging=mil", "hydra/hydra_logging=mil", "hydra.output_subdir=null")


class ShippedConfigs(SearchPathPlugin):
    """Puts the tool's own config groups at the end of Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder of the shipped configs."""
        search_path.append(provider="mil", path=f"file://{configs_folder()}")


def check_path(path: Path) -> Path:
    """Return the recipe's absolute path, or say why Hydra could not read it.

    Raises:
        RecipeError: The file is missing, a folder, not ``.yaml``, or lies where Hydra cannot reach it.
    """
    if path.is_dir():
        inside = sorted(path.glob("*.yaml"))
        hint = f"name the recipe itself, such as {inside[0]}" if inside else "name a .yaml file"
        raise RecipeError("this is a folder, not a recipe", where=str(path), hint=hint)
    if not path.is_file():
        hint = "check the path; `mil list recipes` shows the recipes that come with the tool, `mil init DIR` writes one"
        candidates = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        if candidates and get_close_matches(path.name, candidates, n=1, cutoff=0.6):
            hint = f"{did_you_mean(path.name, candidates)} (in {path.parent})"
        raise RecipeError("no such recipe file", where=str(path), hint=hint)
    if path.suffix != ".yaml":
        raise RecipeError(
            "a recipe's name must end in .yaml", where=str(path), hint=f"rename it to {path.with_suffix('.yaml').name}"
        )
    absolute = path.absolute()
    if "${" in str(absolute):
        raise RecipeError(
            "the path holds '${', which reads as an interpolation", where=str(absolute), hint="rename the folder"
        )
    return absolute


@contextlib.contextmanager
def _hydra_for(path: Path) -> Iterator[None]:
    """Initialize Hydra on the recipe's folder and leave no global state behind."""
    Plugins.instance().register(ShippedConfigs)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    previous = HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(path.parent), job_name="mil", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = previous
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def _explained(path: Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever Hydra, OmegaConf and YAML raise into a `RecipeError` that says what to do."""
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        if key in _FOLDERS:
            raise RecipeError("this program chooses the folders of runs itself", where=key, hint="use --out FOLDER")
    try:
        yield
    except RecursionError:
        raise RecipeError(
            "the recipe includes itself",
            where=str(path),
            hint="a file in its defaults list leads back to it; rename the recipe or the group file",
        ) from None
    except OverrideParseException as error:
        raise RecipeError(
            "this override cannot be read",
            where="command line",
            value=shown(error.override),
            hint="write key=value, such as stages.prune.macs=0.2, and quote it for the shell",
        ) from None
    except MissingConfigException as error:
        raise _missing_config(path, error) from None
    except yaml.YAMLError as error:
        raise _yaml_error(path, error) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition_error(path, error, overrides) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not a text file: {error}", where=str(path), hint="save the recipe as UTF-8") from None
    except ValueError as error:
        if "Config group override" not in str(error):  # what Hydra says of device=5
            raise
        hint = "write the name of a file of the group, such as device=host_cpu"
        raise RecipeError(
            "an option of a group is a name", where="command line", value=list(map(shown, overrides)), hint=hint
        ) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def _yaml_error(path: Path, error: yaml.YAMLError) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    where = str(path)
    if mark is not None:
        name = mark.name if Path(str(mark.name)).is_absolute() else str(path)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return RecipeError(f"not valid YAML: {problem}", where=where, hint="check the indentation, quotes and colons there")


def _group_folders(path: Path) -> list[Path]:
    return [path.parent, configs_folder()]


def _groups(path: Path) -> set[str]:
    """Return the names of all config groups that this recipe can use."""
    found: set[str] = set()
    for file in configs_folder().rglob("*.yaml"):
        found.update(str(parent) for parent in file.relative_to(configs_folder()).parents if str(parent) != ".")
    found.update(file.parent.name for file in path.parent.glob("*/*.yaml"))
    return found


def _missing_config(path: Path, error: MissingConfigException) -> RecipeError:
    missing = (error.missing_cfg_file or "").removesuffix(".yaml")
    where = str(path)
    group, _, option = missing.strip("/").rpartition("/")
    if not group:
        if not option:
            return RecipeError(str(error).splitlines()[0], where=where, hint="check the recipe's defaults list")
        return RecipeError(
            "the defaults list names a file that is not there",
            where=where,
            value=option,
            hint=f"put {option}.yaml beside the recipe, or name a group, such as /model: {option}",
        )
    options: set[str] = set(error.options or ())
    for folder in _group_folders(path):
        options.update(file.stem for file in (folder / group).glob("[!_]*.yaml"))
    if options:
        hint = did_you_mean(option, options)
        return RecipeError(f"no such option for /{group}", where=where, value=option, hint=hint)
    return RecipeError("no such config group", where=where, value=f"/{group}", hint=did_you_mean(group, _groups(path)))


def _composition_error(path: Path, error: BaseException, overrides: Sequence[str]) -> RecipeError:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = str(getattr(cause, "full_key", None) or "")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "No match in the defaults list" in str(error):
        name = text.partition("'")[2].partition("'")[0]
        hint = f"choose it there, such as - /{name}: ..., or set single keys, such as {name}.KEY=VALUE"
        return RecipeError("the recipe's defaults list does not choose this group", where=name or str(path), hint=hint)
    if "Could not override" in text or "append" in str(error) or "is not in struct" in str(cause):
        key = key or text.partition("'")[2].partition("'")[0]
        typed = [override.partition("=")[0].lstrip("+~") for override in overrides]
        key = next((name for name in typed if name == key or name.startswith(f"{key}.")), key)
        step = f"{_closest_key(path, key)}; to add a new key write +{key}=..." if key else "check the overrides"
        return RecipeError("no such key in the recipe", where=key or str(path), hint=step)
    if "Ambiguous value for argument" in text:
        value = text.partition("'")[2].partition("'")[0]
        hint = "add -m to sweep over the values, or write a list as key=[a,b]"
        return RecipeError("several values for one key", where="command line", value=value, hint=hint)
    if "Could not delete" in text:
        name = text.partition("'")[2].partition("'")[0]
        return RecipeError("there is no such key to delete", where=name, hint=_closest_key(path, name))
    if "raised while composing" in text:
        lines = [line for line in str(error).splitlines()[1:] if line.strip()]
        text = lines[0].strip() if lines else text
        text = text.replace("DictConfig", "a mapping").replace("ListConfig", "a list")
        hint = "a key is a mapping in one file of the defaults list and something else in another; make them agree"
        return RecipeError(text, where=key or str(path), hint=hint)
    if "Could not find" in text and "defaults" in str(error):
        return RecipeError(text, where=str(path), hint="check the names in the recipe's defaults list")
    return RecipeError(
        text.rstrip(":"), where=key or str(path), hint="check the defaults list and interpolations of the recipe"
    )


def _closest_key(path: Path, key: str) -> str:
    try:
        composed = _compose_raw(path, ())
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return f"check the spelling of '{key}'"
    content = OmegaConf.to_container(composed, resolve=False)
    known = [name for name in dotted_keys(content) if not name.startswith("hydra")]
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    return did_you_mean(key, close or siblings or ["chain", "stages"])


def dotted_keys(content: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of nested mappings, inner ones after their parents."""
    if not isinstance(content, dict):
        return []
    keys: list[str] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        keys += [key, *dotted_keys(value, f"{key}.")]
    return keys


def _compose_raw(path: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose without explaining errors; Hydra's own node is still in the result."""
    with _hydra_for(path):
        return hydra.compose(path.stem, [_adding(override) for override in overrides], return_hydra_config=True)


def compose(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose a recipe and resolve its interpolations.

    Args:
        path: The recipe's file.
        overrides: Hydra overrides such as ``stages.prune.macs=0.2``.

    Returns:
        Plain nested mappings, lists and scalars.

    Raises:
        RecipeError: The recipe cannot be read or composed.
        RecipeErrors: Values are missing or interpolations lead nowhere; all are listed.
    """
    path = check_path(path)
    with _explained(path, overrides):
        config = _compose_raw(path, overrides)
        HydraConfig.instance().set_config(config)
        try:
            return plain(config, path=path)
        finally:
            HydraConfig.instance().cfg = None


def plain(config: DictConfig, *, path: Path) -> dict[str, Any]:
    """Return a composed configuration as plain values, without Hydra's own node.

    Raises:
        RecipeErrors: Values are missing (``???``) or interpolations lead nowhere; all are listed.
    """
    problems: list[RecipeError] = []

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, DictConfig):
            if node._is_none():
                return None
            return {name: read(node, name, dotted(key, str(name))) for name in node}
        if isinstance(node, ListConfig):
            if node._is_none():
                return None
            return [read(node, index, dotted(key, index)) for index in range(len(node))]
        return node

    def read(parent: DictConfig | ListConfig, name: Any, key: str) -> Any:
        if key == "hydra":
            return None
        if OmegaConf.is_missing(parent, name):
            problems.append(RecipeError("a value is needed here", where=key, value="???", hint=f"set {key}=..."))
            return None
        try:
            child = parent[name]
        except OmegaConfBaseException as error:
            raw = OmegaConf.to_container(parent, resolve=False)
            value = raw[name] if isinstance(raw, dict | list) else None
            text = str(error).splitlines()[0]
            problems.append(
                RecipeError(text, where=key, value=value, hint="the interpolation must name a key that exists")
            )
            return None
        return walk(child, key)

    content = walk(config, "")
    if problems:
        raise RecipeErrors(problems, where=str(path))
    if not isinstance(content, dict):
        raise RecipeError("a recipe must be a mapping of keys", where=str(path))
    content.pop("hydra", None)
    return content


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep: its number, the overrides that make it, and the composed recipe."""

    number: int
    overrides: tuple[str, ...]
    content: dict[str, Any]


def sweep_points(path: Path, overrides: Sequence[str]) -> list[SweepPoint] | None:
    """Return every point of a sweep, composed; None if the sweeper decides on points only as results come in.

    Raises:
        RecipeError: The recipe or a point cannot be composed.
    """
    path = check_path(path)
    found: list[SweepPoint] = []

    def collect(config: DictConfig) -> None:
        job = HydraConfig.get()
        content = plain(config, path=path)
        found.append(SweepPoint(int(job.job.num), tuple(map(shown, job.overrides.task)), content))

    with tempfile.TemporaryDirectory(prefix="mil-sweep-") as folder, _explained(path, overrides), _hydra_for(path):
        application = _application()
        settings = _sweep_settings(path, overrides, Path(folder), launcher="basic")
        config = application.compose_config(path.stem, settings, run_mode=RunMode.MULTIRUN)
        if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
            return None
        application.multirun(path.stem, collect, settings)
    return found


def sweep(path: Path, overrides: Sequence[str], task_function: Callable[[DictConfig], Any], *, directory: Path) -> None:
    """Run `task_function` for every point of a sweep, by the recipe's sweeper and launcher.

    Args:
        path: The recipe's file.
        overrides: Hydra overrides, comma lists and ``range()`` included.
        task_function: Called with each point's configuration; it must be picklable for process launchers.
        directory: The sweep's folder; point number n runs in its sub-folder ``n``.

    Raises:
        RecipeError: The recipe or a point's overrides cannot be composed.
    """
    path = check_path(path)
    with _explained(path, overrides), _hydra_for(path):
        settings = _sweep_settings(path, overrides, directory, launcher=None)
        _application().multirun(path.stem, task_function, settings)


def _adding(override: str) -> str:
    """Let ``goals.size.max=50kB`` add a key that the recipe leaves to its default, without Hydra's ``+``.

    A misspelt key is found all the same, when the composed recipe is validated.
    """
    key = override.partition("=")[0]
    plain_key = "." in key and not key.startswith(("+", "~", "hydra.")) and not {"/", "@"} & set(key)
    return f"++{override}" if plain_key and "=" in override else override


def shown(override: str) -> str:
    """Return an override as the user typed it."""
    return override.removeprefix("++")


def _application() -> Hydra:
    application = GlobalHydra.instance().hydra
    if application is None:
        raise RuntimeError("Hydra is not initialized")
    return application


def _sweep_settings(path: Path, overrides: Sequence[str], directory: Path, *, launcher: str | None) -> list[str]:
    text = str(directory.absolute())
    if "${" in text:
        raise RecipeError("the output path holds '${', which reads as an interpolation", where=text, hint="rename it")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    # Hydra takes `key` and `++key` for two axes: a key that the recipe sweeps over must be written as the recipe does.
    swept = _application().compose_config(path.stem, [], run_mode=RunMode.MULTIRUN).hydra.sweeper.get("params") or {}
    chosen = [override if override.partition("=")[0] in swept else _adding(override) for override in overrides]
    chosen = [override for override in chosen if launcher is None or not override.startswith("hydra/launcher=")]
    if launcher is not None:
        chosen = [override for override in chosen if not override.lstrip("+").startswith("hydra.launcher.")]
    return [
        *chosen,
        *LOGGING_OVERRIDES,
        "hydra.mode=MULTIRUN",
        f"hydra.sweep.dir='{quoted}'",
        "hydra.sweep.subdir=${hydra.job.num}",
        *([f"hydra/launcher={launcher}"] if launcher is not None else []),
    ]
