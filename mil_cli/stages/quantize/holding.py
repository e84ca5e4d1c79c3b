"""The search for the most compressed setting of a method that holds a bound on quality, and its settings."""

from __future__ import annotations

import glob
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.stages.judging import mean_loss, quality_or_worst
from mil_cli.stages.registry import StageConfig
from mil_cli.stages.targets import Drop
from mil_cli.training.quality import relative_drop

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class BoundedConfig(StageConfig):
    """Settings of a method that leaves layers float: those that are named, or that cost more quality than is allowed.

    Attributes:
        skip: Layers to leave float: module paths (with all below), node names, or patterns with ``*``.
        max_drop: By what share of its value the quality on val may get worse in this stage, relative to the model that
            the stage is given: layers get 4 or 8 bits where the method has bits by layer, or stay float, until that
            holds, those first that do most damage, and all of them where nothing else holds. Each setting that is
            tried is a whole run of the method. None: the settings hold, whatever comes of it.
        max_drop_samples: For `max_drop`: samples of val on which the damage of single layers is measured.
    """

    skip: tuple[str, ...] = ()
    max_drop: Drop | None = None
    max_drop_samples: int = Field(1000, ge=1)


C = TypeVar("C", bound=BoundedConfig)

_TOO_DEAR = "it cost more than max_drop"


class Holding(ABC, Generic[C]):
    """Looks for the most compressed setting that holds a bound.

    Layers are ranked once by the loss with each of them alone quantized. Then the fewest of the worst that must get
    more bits are found by bisection, every step of it being a whole run of the method and its quality on val. Where
    these are not enough for all, all have them, and the worst get the next number of bits. Where no bits are enough, or
    the method has none by layer, those that stay float are found in the same way.

    Args:
        model: The float model.
        config: The settings, with the bound.
        context: Gives val, progress and checkpoints.

    Raises:
        StageError: The float model's outputs are not finite.
    """

    def __init__(self, model: Model, config: C, context: Context) -> None:
        if config.max_drop is None:
            raise ValueError("the settings have no bound")
        self._model, self._config, self._context, self._bound = model, config, context, config.max_drop
        self._slot = context.slot("max_drop")
        self._state: dict[str, Any] = self._slot.load() or {"float": None, "ranks": {}, "forms": {}, "trials": []}
        self._before = dict(context.notes)
        self._best: tuple[int, Model] | None = None
        self._layers: list[str] = []
        if self._state["float"] is None:
            self._state["float"] = self._quality(model)
            self._slot.save(self._state)
        if not math.isfinite(self._state["float"]):
            raise StageError("the model's outputs are not finite", where=f"stages.{context.name}.max_drop")

    def _with(self, *, widened: Mapping[str, int], spared: Sequence[str]) -> C:
        """Return the method's settings, without the bound, by which some layers get more bits and some stay float."""
        skip = (*self._config.skip, *map(glob.escape, spared))
        return self._config.model_copy(update={"skip": skip, "max_drop": None})

    @abstractmethod
    def _names(self, widened: Mapping[str, int]) -> list[str]:
        """Return the layers that are quantized, where some get more bits."""

    @abstractmethod
    def _damage(self, name: str, widened: Mapping[str, int]) -> float:
        """Return the loss with one layer alone quantized, where some get more bits."""

    def _wider(self) -> Mapping[int, Collection[str]]:
        """Return, for more and more bits, the layers that may get so many."""
        return {}

    def search(self) -> Model:
        """Return the model of the most compressed setting that holds: the float one if no other does."""
        with self._context.progress.work(f"{self._context.name}: holding max_drop") as bar:
            self._advance = bar.advance
            first = self._trial({}, [])
            found = first if self._holds(first) else self._spare()
        return self._leave_float() if found is None else self._conclude(found)

    def _spare(self) -> int | None:
        """Return the trial that holds with the fewest layers spared; None if not even one can be quantized."""
        ranked = self._ranked("start", {})
        widened: dict[str, int] = {}
        for bits, wider in self._wider().items():
            narrow = [name for name in ranked if name in wider]
            found = self._fewest(len(narrow), partial(self._widen, widened, narrow, bits))
            if found is not None:
                return found
            widened |= dict.fromkeys(narrow, bits)
        if widened:
            ranked = self._ranked("wide", widened)
        return self._fewest(len(ranked) - 1, lambda count: self._trial(widened, ranked[:count]))

    def _widen(self, widened: Mapping[str, int], names: Sequence[str], bits: int, count: int) -> int:
        return self._trial({**widened, **dict.fromkeys(names[:count], bits)}, [])

    def _fewest(self, most: int, trial: Callable[[int], int]) -> int | None:
        """Return the trial of the smallest count that holds, taking it that more hold better; None if `most` fails."""
        if most < 1 or not self._holds(found := trial(most)):
            return None
        fails, holds = 0, most
        while holds - fails > 1:
            middle = (fails + holds) // 2
            tried = trial(middle)
            if self._holds(tried):
                holds, found = middle, tried
            else:
                fails = middle
        return found

    @property
    def _trials(self) -> list[dict[str, Any]]:
        trials: list[dict[str, Any]] = self._state["trials"]
        return trials

    def _drop(self, number: int) -> float:
        quality, higher = self._trials[number]["quality"], self._context.task.higher_is_better
        return relative_drop(self._state["float"], quality, higher_is_better=higher)

    def _holds(self, number: int) -> bool:
        drop = self._drop(number)
        return drop <= self._bound or math.isclose(drop, self._bound, rel_tol=1e-9)

    def _quality(self, model: Model) -> float:
        return quality_or_worst(model, self._context, samples=len(self._context.data.val))

    def _loss(self, model: Model) -> float:
        samples = min(self._config.max_drop_samples, len(self._context.data.val))
        return mean_loss(model, self._context, samples=samples)

    def _trial(self, widened: Mapping[str, int], spared: Sequence[str]) -> int:
        """Return the number of the trial in which some layers get more bits, and some stay float."""
        setting = {"widened": dict(sorted(widened.items())), "spared": sorted(spared)}
        for number, trial in enumerate(self._trials):
            if all(trial[key] == value for key, value in setting.items()):
                return number
        number = len(self._trials)
        last = f"drop {100 * self._drop(number - 1):.2f} %; " if number else ""
        self._advance(0, note=f"{last}now layers with more bits: {len(widened)}, left float: {len(spared)}")
        model, notes = self._run(setting, number)
        self._trials.append({**setting, "quality": self._quality(model), "notes": notes})
        self._slot.save(self._state)
        drop = self._drop(number)
        self._advance(note=f"drop {100 * drop:.2f} %")
        if self._holds(number):
            self._best = number, model
        return number

    def _run(self, setting: dict[str, Any], number: int) -> tuple[Model, dict[str, object]]:
        self._context.notes.clear()
        model = self._context.run(self._model, self._with(**setting), name=f"trial{number}")
        told = dict(self._context.notes)
        self._forget_notes()
        return model, told

    def _ranked(self, key: str, widened: Mapping[str, int]) -> list[str]:
        """Return the names of the layers, those first that do most damage.

        Args:
            key: Where what was measured is kept.
            widened: The layers that get more bits, and how many.
        """
        names = self._layers = self._names(widened)
        self._forget_notes()
        losses: list[float] = self._state["ranks"].setdefault(key, [])
        with self._context.progress.work(
            f"{self._context.name}: damage of layers", len(names), done=len(losses)
        ) as bar:
            for name in names[len(losses) :]:
                losses.append(self._damage(name, widened))
                self._forget_notes()
                self._slot.save(self._state)
                bar.advance()
        return [name for _, name in sorted(zip(losses, names, strict=True), key=lambda pair: -pair[0])]

    def _forget_notes(self) -> None:
        """Take back what trials told, as it is not of what is made."""
        self._context.notes.clear()
        self._context.notes.update(self._before)

    def _leave_float(self) -> Model:
        """Return the float model, and tell that no quantized one holds."""
        context, told = self._context, self._trials[0]["notes"]
        best = min(self._drop(number) for number in range(len(self._trials)))
        kept = {**told.get("kept_float", {}), **dict.fromkeys(self._layers, _TOO_DEAR)}
        context.note(**{key: 0 for key in told if key.startswith("quantized_")}, kept_float=kept)
        context.note(max_drop=self._bound, drop=0.0, trials=len(self._trials), widened={}, spared=sorted(self._layers))
        context.progress.notice(
            f"{context.name}: no quantized model holds max_drop {100 * self._bound:.4g} %, the best of "
            f"{len(self._trials)} loses {100 * best:.4g} %: all layers stay float"
        )
        return self._model.clone()

    def _conclude(self, number: int) -> Model:
        """Return the model of a trial that holds, and tell what it took."""
        context, trial = self._context, self._trials[number]
        if self._best is None or self._best[0] != number:
            setting = {key: trial[key] for key in ("widened", "spared")}
            self._best = number, self._run(setting, number)[0]
        context.note(**trial["notes"])
        kept = context.notes.get("kept_float")
        if isinstance(kept, dict):
            context.notes["kept_float"] = {**kept, **dict.fromkeys(trial["spared"], _TOO_DEAR)}
        context.note(max_drop=self._bound, drop=self._drop(number), trials=len(self._trials))
        context.note(widened=trial["widened"], spared=trial["spared"])
        return self._best[1]
