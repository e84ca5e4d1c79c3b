"""From a recipe file to a validated `Recipe`; everything that is wrong with it is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mil_cli.device.host import detect, filled
from mil_cli.device.profile import DeviceProfile
from mil_cli.errors import MilError, RecipeError, RecipeErrors, did_you_mean
from mil_cli.models.source import ModelSource, resolve_path
from mil_cli.recipe.compose import check_path, compose
from mil_cli.recipe.goals import Goals
from mil_cli.recipe.problems import validate
from mil_cli.recipe.schema import NAME, MeasureConfig, Recipe
from mil_cli.stages.registry import StageConfig, check_order, config_type
from mil_cli.training.config import TrainerConfig


class _Outline(BaseModel):
    """The top level of a composed recipe, before its parts are looked at."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    model: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]
    device: dict[str, Any]
    trainer: dict[str, Any] = {}
    baseline: dict[str, Any] | None = None
    goals: dict[str, Any] | None = None
    chain: list[str]
    stages: dict[str, dict[str, Any]]
    measure: dict[str, Any] = {}
    rank: dict[str, Any] | None = None


class _TableOutline(_Outline):
    """The top level of a recipe that ranks a table, which may leave out all that a model needs."""

    name: str | None = Field(None, min_length=1, pattern=NAME)
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    task: dict[str, Any] = {}
    device: dict[str, Any] = {}
    chain: list[str] = []
    stages: dict[str, dict[str, Any]] = {}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Compose, resolve and validate a recipe.

    Args:
        path: The recipe's file.
        overrides: Hydra overrides such as ``stages.prune.macs=0.2``.

    Raises:
        RecipeError: The file cannot be read or composed.
        RecipeErrors: The composed recipe is not valid; every problem is listed with its key.
    """
    return build_recipe(compose(path, overrides), path=path)


def build_recipe(content: Mapping[str, Any], *, path: Path) -> Recipe:
    """Validate a composed recipe.

    Args:
        content: Plain values, interpolations resolved.
        path: The recipe's file; its folder becomes the recipe's root.

    Raises:
        RecipeError: The recipe ranks a table, and has no model.
        RecipeErrors: Every problem, each with its dotted key, the value and the next step.
    """
    path = check_path(path)
    if isinstance(content.get("rank"), Mapping) and "table" in content["rank"]:
        hint = f"rank the table by: mil rank {path}"
        raise RecipeError("the recipe ranks a table, it has no model", where="rank.table", hint=hint)
    problems: list[MilError] = []
    outline = _outline(content, problems)
    model = validate(ModelSource, outline["model"], where="model", problems=problems) if outline["model"] else None
    if model is not None:
        _check_files(model, path.parent, problems)
    trainer = validate(TrainerConfig, outline["trainer"], where="trainer", problems=problems)
    goals = validate(Goals, outline["goals"], where="goals", problems=problems)
    measure = validate(MeasureConfig, outline["measure"], where="measure", problems=problems)
    rank = None
    if outline["rank"] is not None:
        from mil_cli.recipe.rank import space_ranking

        rank = space_ranking(outline["rank"], trainer, problems=problems)
    if outline["device"]:
        validate(DeviceProfile, filled(outline["device"], detect()), where="device", problems=problems)
    for part in ("data", "task"):
        if outline[part] and "_target_" not in outline[part]:
            hint = f"choose one in the defaults list, such as - /{part}: ..., or set {part}._target_"
            problems.append(RecipeError("a value is needed here", where=f"{part}._target_", hint=hint))

    stages = _stages(outline["stages"], problems)
    baseline = None
    if outline["baseline"] is not None:
        baseline = _stage("baseline", outline["baseline"], problems, keys=())
        if baseline is not None and baseline.family != "train":
            hint = "use family: train, method: supervised, or baseline: null to take the weights as they are"
            problems.append(
                RecipeError("the baseline must be trained", where="baseline.family", value=baseline.family, hint=hint)
            )
    trained = {"baseline": baseline, **{f"stages.{key}": stage for key, stage in stages.items()}}
    _check_trainer_overrides(trained, trainer, problems)
    _check_recovery(stages, outline["stages"], problems)
    if outline["rank"] is None or outline["chain"]:
        _check_chain(outline["chain"], outline["stages"], stages, problems)

    if not problems:
        recipe = validate(
            Recipe,
            {
                "name": outline["name"] or path.stem,
                "path": path,
                "root": path.parent,
                "seed": outline["seed"],
                "model": model,
                "data": outline["data"],
                "task": outline["task"],
                "device": outline["device"],
                "trainer": trainer,
                "baseline": baseline,
                "goals": goals,
                "chain": outline["chain"],
                "stages": stages,
                "measure": measure,
                "rank": rank,
                "resolved": dict(content),
            },
            problems=problems,
        )
        if recipe is not None:
            return recipe
    raise RecipeErrors(problems, where=str(path))


def table_outline(content: Mapping[str, Any], problems: list[MilError]) -> _TableOutline | None:
    """Validate the top level of a recipe that ranks a table; what is wrong is added to `problems`."""
    return validate(_TableOutline, content, problems=problems)


_WHOLE = {
    "model": "choose one in the defaults list, such as - /model: resnet20, or set model._target_",
    "data": "choose one in the defaults list, such as - /data: digits, or set data._target_",
    "task": "choose one in the defaults list, such as - /task: classification, or set task._target_",
    "device": "choose one in the defaults list, such as - /device: host_cpu",
    "chain": "list the stages to run, such as chain: [prune, quantize]; - /mil/defaults belongs in the defaults list",
    "stages": "choose stages in the defaults list, such as - /stage/quantize@stages.quantize: static",
}


def _outline(content: Mapping[str, Any], problems: list[MilError]) -> dict[str, Any]:
    """Return the parts of the recipe; those that are missing or of the wrong form are reported and empty."""
    found: list[MilError] = []
    validate(_Outline, content, problems=found)
    bad: set[str] = set()
    for problem in found:
        key = str(problem.where)
        bad.add(key.partition(".")[0].partition("[")[0])
        if key in _WHOLE and problem.what == "a value is needed here":
            problem = RecipeError(problem.what, where=key, hint=_WHOLE[key])
        problems.append(problem)
    parts: dict[str, Any] = {
        "name": None,
        "seed": 0,
        "model": None,
        "data": None,
        "task": None,
        "device": None,
        "trainer": {},
        "baseline": None,
        "goals": {},
        "chain": None,
        "stages": {},
        "measure": {},
        "rank": None,
    }
    parts.update({key: content[key] for key in parts if key in content and key not in bad})
    parts["goals"] = parts["goals"] or {}
    if "stages" in bad and isinstance(content.get("stages"), dict):
        parts["stages"] = {key: value for key, value in content["stages"].items() if isinstance(value, dict)}
    return parts


def _check_files(model: ModelSource, root: Path, problems: list[MilError]) -> None:
    given = {"model.pt2": model.pt2, "model.checkpoint": model.checkpoint}
    for key, path in given.items():
        if path is not None and not resolve_path(path, root).is_file():
            hint = f"relative paths are taken from the recipe's folder, {root}"
            problems.append(RecipeError("there is no such file", where=key, value=str(path), hint=hint))


def _stages(content: Mapping[str, Mapping[str, Any]], problems: list[MilError]) -> dict[str, StageConfig]:
    stages: dict[str, StageConfig] = {}
    complete = [key for key, value in content.items() if "family" in value and "method" in value]
    for key, value in content.items():
        if re.fullmatch(NAME, key) is None:
            hint = "write a name without / and \\"
            problems.append(RecipeError("a stage's key names a folder", where="stages", value=key, hint=hint))
        stage = _stage(f"stages.{key}", value, problems, keys=complete)
        if stage is not None:
            stages[key] = stage
    return stages


def _stage(
    where: str, content: Mapping[str, Any], problems: list[MilError], *, keys: Sequence[str]
) -> StageConfig | None:
    """Validate the settings of one stage by the type that its family and method select."""
    missing = [name for name in ("family", "method") if not isinstance(content.get(name), str)]
    if missing:
        name = where.rpartition(".")[2]
        close = did_you_mean(name, keys) if keys else ""
        hint = f"choose its method in the defaults list, such as - /stage/quantize@{where}: static"
        if close.startswith("did you mean"):
            hint = f"{close}; else {hint}"
        problems.append(RecipeError(f"the stage has no {' and no '.join(missing)}", where=where, hint=hint))
        return None
    try:
        kind = config_type(content["family"], content["method"])
    except MilError as error:
        problems.append(RecipeError(error.what, where=where, hint=error.hint))
        return None
    settings = {name: value for name, value in content.items() if name not in ("family", "method")}
    return validate(kind, settings, where=where, problems=problems, aliases=("family", "method"))


def _check_trainer_overrides(
    stages: Mapping[str, StageConfig | None], trainer: TrainerConfig | None, problems: list[MilError]
) -> None:
    if trainer is None:
        return
    for where, stage in stages.items():
        for field in ("trainer", "recover_trainer"):
            overrides = getattr(stage, field, None)
            if isinstance(overrides, Mapping) and overrides:
                validate(TrainerConfig, trainer.merged(overrides), where=f"{where}.{field}", problems=problems)


def _check_recovery(stages: Mapping[str, StageConfig], keys: Iterable[str], problems: list[MilError]) -> None:
    """Check that the stage by which another one recovers, or whose loss it trains on, exists and trains.

    What a field `by` names must exist; whether it is of the right kind its stage says.
    """
    known = set(keys)
    for key, stage in stages.items():
        for field in ("recover", "distill", "regularise", "finetune", "by"):
            name = getattr(stage, field, None)
            if not isinstance(name, str):
                continue
            where = f"stages.{key}.{field}"
            if name not in known:
                problems.append(
                    RecipeError("there is no such stage", where=where, value=name, hint=did_you_mean(name, known))
                )
            elif field != "by" and name in stages and stages[name].family not in ("train", "distill"):
                hint = "name a stage of the family train or distill"
                problems.append(RecipeError("that stage does not train", where=where, value=name, hint=hint))
            elif field == "by" and name in stages:
                try:
                    stage.check_by(stages[name], name=key)
                except MilError as error:
                    problems.append(error)


def _check_chain(
    chain: Sequence[str] | None,
    content: Mapping[str, Any],
    stages: Mapping[str, StageConfig],
    problems: list[MilError],
) -> None:
    if chain is None:
        return
    if not chain:
        names = ", ".join(content) or "name, name"
        problems.append(RecipeError("the chain is empty", where="chain", value=[], hint=f"write chain: [{names}]"))
    for position, name in enumerate(chain):
        if name not in content:
            hint = did_you_mean(name, content) if content else _WHOLE["stages"]
            problems.append(RecipeError("there is no such stage", where=f"chain[{position}]", value=name, hint=hint))
    problems.extend(check_order([(name, stages[name]) for name in chain if name in stages]))
