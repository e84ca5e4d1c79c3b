"""Builds what a recipe's stages may read: task, data, device, and the uncompressed model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.data.source import build_data
from mil_cli.device.host import resolve
from mil_cli.errors import DataError, ModelError, RecipeError
from mil_cli.files import sha256_of_file
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, build_model, build_module, capture_module
from mil_cli.models.user_code import locate_in, source_sha256
from mil_cli.spaces import DesignedSpace
from mil_cli.stages.surroundings import Surroundings, derive_seed, fingerprint_of
from mil_cli.task.source import build_task

if TYPE_CHECKING:
    from mil_cli.data.base import Data
    from mil_cli.recipe.schema import Recipe
    from mil_cli.task.base import Task

EXAMPLE_BATCH = 4
"""Samples in the batch that a model is captured with."""


def build_surroundings(recipe: Recipe) -> Surroundings:
    """Build everything that stages may read, but the uncompressed model.

    Raises:
        MilError: Data are missing, the task does not fit, the device profile asks for what this machine lacks.
    """
    device = resolve(recipe.device)
    data = build_data(recipe.data, root=recipe.root)
    task = build_task(recipe.task, root=recipe.root)
    sources = _Sources(recipe=recipe, data=data, task=task)
    return Surroundings(
        seed=recipe.seed,
        task=task,
        data=data,
        device=device,
        trainer=recipe.trainer,
        goals=recipe.goals.asked(),
        stages=recipe.stages,
        load_source=sources.load,
        source_fingerprint=sources.fingerprint,
        load_data=_OtherData(recipe.root).load,
        load_space=partial(space_of, recipe),
        capture=lambda module: capture_module(recipe.model, module, example=example_of(data, task)),
        space_fingerprint=lambda: fingerprint_of(
            [sources.fingerprint(recipe.model.model_dump(mode="json")), recipe.seed]
        ),
    )


def source_model(recipe: Recipe, surroundings: Surroundings) -> Model:
    """Build and capture the recipe's own model; of a space, its largest architecture.

    Raises:
        ModelError: It cannot be built, its checkpoint does not fit, or it cannot be captured.
    """
    return _build(recipe.model, recipe, surroundings.data, surroundings.task, purpose="model")


def _build(source: ModelSource, recipe: Recipe, data: Data, task: Task, *, purpose: str) -> Model:
    example = example_of(data, task)
    return build_model(source, root=recipe.root, example=example, seed=derive_seed(recipe.seed, purpose))


def example_of(data: Data, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a recipe's model, that it is captured with."""
    return task.inputs(next(iter(data.train.batches(EXAMPLE_BATCH))))


def space_of(recipe: Recipe) -> DesignedSpace:
    """Return the space that a recipe's model is, with the weights that its own model begins with.

    Raises:
        ModelError: It cannot be built, or holds no choice.
    """
    if recipe.model.target is None:
        hint = "give model._target_, a function that builds a module with choices of mil_cli.spaces"
        raise ModelError("a .pt2 file holds one net, without choices", value=str(recipe.model.pt2), hint=hint)
    return DesignedSpace(build_module(recipe.model, root=recipe.root, seed=derive_seed(recipe.seed, "model")))


class _OtherData:
    """Data that a stage may ask for beside the recipe's; each is built once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._built: dict[str, Data] = {}

    def load(self, settings: object) -> Data:
        if not isinstance(settings, Mapping) or "_target_" not in settings:
            hint = "write data: {_target_: ..., ...} as in the recipe's own section data"
            raise DataError("these are no settings of data", where="data", value=settings, hint=hint)
        key = json.dumps(settings, sort_keys=True)
        if key not in self._built:
            self._built[key] = build_data(settings, root=self._root)
        return self._built[key]


def _targets(settings: object) -> Iterator[str]:
    """Yield the ``_target_`` of settings and of those inside them."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("_target_"), str):
            yield settings["_target_"]
        settings = list(settings.values())
    for part in settings if isinstance(settings, list | tuple) else ():
        yield from _targets(part)


class _Sources:
    """Other models that a stage may ask for, such as teachers."""

    def __init__(self, *, recipe: Recipe, data: Data, task: Task) -> None:
        self._recipe = recipe
        self._data = data
        self._task = task

    def load(self, source: object) -> Model:
        return _build(self._parse(source), self._recipe, self._data, self._task, purpose="source")

    def fingerprint(self, source: object) -> str:
        parsed = self._parse(source)
        root = self._recipe.root
        files = [sha256_of_file(path) for path in parsed.files(root) if path.is_file()]
        # Not of all modules that are loaded: that would hang on what was loaded before, and lack this source's own.
        targets = _targets({"_target_": parsed.target, **parsed.arguments})
        located = (locate_in(target, root=root, where="model._target_", error=ModelError) for target in targets)
        return fingerprint_of([parsed.model_dump(mode="json"), files, [source_sha256(one) for one in located]])

    def _parse(self, source: object) -> ModelSource:
        from pydantic import ValidationError

        settings: Any = {"pt2": source} if isinstance(source, str | Path) else source
        if not isinstance(settings, Mapping):
            raise ModelError(
                "this is no model source", value=source, hint="give a .pt2 file, or _target_ and arguments"
            )
        try:
            return ModelSource.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(first["msg"], where=".".join(map(str, first["loc"])), value=source) from None
