"""Quantization that stops short of a bound on the loss of quality: the worst layers get more bits, or stay float."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.graph.nodes import get_argument, op_name
from mil_cli.stages.judging import mean_loss, quality_or_worst
from mil_cli.stages.quantize.passing import after_rectifier
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.post_training import PostTrainingConfig, prepare
from mil_cli.stages.quantize.settings import LayerSettings
from mil_cli.training.quality import relative_drop

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

F = TypeVar("F", bound=Callable[..., "Model"])

_FULL = 8
"""Bits of layers that get more."""


def within_drop(quantize: F) -> F:
    """Make a method that quantizes a trained model hold `max_drop`, where its settings ask for it.

    Args:
        quantize: The method's function; its settings are a `PostTrainingConfig`.

    Returns:
        A function that runs it once, or tries settings until the quality on val holds.
    """

    @wraps(quantize)
    def controlled(model: Model, config: PostTrainingConfig, context: Context) -> Model:
        if config.max_drop is None:
            return quantize(model, config, context)
        return _Control(model, config, context, config.max_drop).search()

    return cast("F", controlled)


class _Control:
    """Looks for the most compressed setting that holds a bound.

    Layers are ranked once by the loss with each of them alone quantized; then the fewest of the worst that must be
    spared are found by bisection, every step of it being a whole run of the method and its quality on val. Where 8 bits
    for all are not enough, those that stay float are found in the same way.

    Args:
        model: The float model.
        config: The method's settings.
        context: Gives val, progress and checkpoints.
        bound: By what share the quality may get worse.
    """

    def __init__(self, model: Model, config: PostTrainingConfig, context: Context, bound: float) -> None:
        self._model, self._config, self._context, self._bound = model, config, context, bound
        self._slot = context.slot("max_drop")
        self._state: dict[str, Any] = self._slot.load() or {"float": None, "ranks": {}, "trials": []}
        self._before = dict(context.notes)
        self._best: tuple[int, Model] | None = None
        if self._state["float"] is None:
            self._state["float"] = self._quality(model)
            self._slot.save(self._state)

    def search(self) -> Model:
        """Return the model of the most compressed setting that holds, or of the best one.

        Raises:
            StageError: The outputs of every quantized model are not finite.
        """
        with self._context.progress.work(f"{self._context.name}: holding max_drop") as bar:
            self._advance = bar.advance
            found = self._trial([], [])
            if not self._holds(found):
                found = self._spare()
        return self._conclude(found)

    def _spare(self) -> int:
        """Return the trial that holds with the fewest layers spared, or the best there is."""
        ranked = self._ranked("start", [])
        narrow = [name for name in ranked if name in self._state["narrow"]]
        if narrow:
            found = self._fewest(len(narrow), lambda count: self._trial(narrow[:count], []))
            if found is not None:
                return found
            ranked = self._ranked("wide", narrow)
        found = self._fewest(len(ranked) - 1, lambda count: self._trial(narrow, ranked[:count]))
        if found is not None:
            return found
        sign = 1 if self._context.task.higher_is_better else -1
        return max(range(len(self._state["trials"])), key=lambda number: sign * self._trials[number]["quality"])

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

    def _trial(self, widened: Sequence[str], spared: Sequence[str]) -> int:
        """Return the number of the trial in which some layers get 8 bits, and some stay float."""
        names = {"widened": sorted(widened), "spared": sorted(spared)}
        for number, trial in enumerate(self._trials):
            if all(trial[key] == value for key, value in names.items()):
                return number
        number = len(self._trials)
        model, notes = self._run(names, number)
        self._trials.append({**names, "quality": self._quality(model), "notes": notes})
        self._slot.save(self._state)
        drop = self._drop(number)
        self._advance(note=f"drop {100 * drop:.2f} %")
        if self._holds(number) or self._best is None or drop < self._drop(self._best[0]):
            self._best = number, model
        return number

    def _run(self, names: dict[str, list[str]], number: int) -> tuple[Model, dict[str, object]]:
        notes = self._context.notes
        notes.clear()
        model = self._context.run(self._model, self._with(**names), name=f"trial{number}")
        told = dict(notes)
        notes.clear()
        notes.update(self._before)
        return model, told

    def _with(self, *, widened: Sequence[str], spared: Sequence[str]) -> PostTrainingConfig:
        layers = dict(self._config.layers)
        for name in sorted(widened):  # the path of a layer is also a pattern for those below it
            layers.pop(glob.escape(name), None)
            per_channel = self._state["narrow"][name]
            layers[glob.escape(name)] = LayerSettings(weight_bits=_FULL, activation_bits=_FULL, per_channel=per_channel)
        skip = (*self._config.skip, *(glob.escape(name) for name in spared))
        return self._config.model_copy(update={"layers": layers, "skip": skip, "max_drop": None})

    def _ranked(self, key: str, widened: Sequence[str]) -> list[str]:
        """Return the names of the layers, those first that do most damage; and remember which have fewer than 8 bits.

        Args:
            key: Where what was measured is kept.
            widened: The layers that get 8 bits.
        """
        context, config = self._context, self._with(widened=widened, spared=[])
        # Biases that make up for the rounding of all layers would be wrong for each of them alone.
        config = config.model_copy(update={"bias_correction": False})
        prepared = prepare(self._model, config, context)
        placement, rules = prepared.placement, prepared.rules
        quantized = prepared.insert()
        context.notes.clear()
        context.notes.update(self._before)
        forms = {layer.name: rules.of_layer(layer) for layer in placement.layers}
        if not widened:
            computing = {layer.name for layer in placement.products}
            self._state["narrow"] = {
                name: form.per_channel
                for name, form in forms.items()
                if form.weight_bits < _FULL or (form.activation_bits < _FULL and name in computing)
            }
        losses: list[float] = self._state["ranks"].setdefault(key, [])
        names, samples = list(forms), min(config.max_drop_samples, len(context.data.val))
        with context.progress.work(f"{context.name}: damage of layers", len(names), done=len(losses)) as bar:
            for name in names[len(losses) :]:
                nodes = [layer.node for layer in placement.layers if layer.name == name]
                with alone(quantized.graph, nodes, placement):
                    losses.append(mean_loss(quantized, context, samples=samples))
                self._slot.save(self._state)
                bar.advance()
        return [name for _, name in sorted(zip(losses, names, strict=True), key=lambda pair: -pair[0])]

    def _conclude(self, number: int) -> Model:
        """Return the model of a trial, and tell what became of the bound."""
        context, trial, drop = self._context, self._trials[number], self._drop(number)
        if not math.isfinite(trial["quality"]):
            raise StageError("no quantized model has finite outputs", where=f"stages.{context.name}.max_drop")
        if self._best is None or self._best[0] != number:
            names = {key: trial[key] for key in ("widened", "spared")}
            self._best = number, self._run(names, number)[0]
        context.note(**trial["notes"])
        kept = context.notes.get("kept_float")
        if isinstance(kept, dict):
            context.notes["kept_float"] = {**kept, **dict.fromkeys(trial["spared"], "it cost more than max_drop")}
        context.note(max_drop=self._bound, drop=drop, max_drop_held=self._holds(number), trials=len(self._trials))
        context.note(widened=trial["widened"], spared=trial["spared"])
        if not self._holds(number):
            context.progress.notice(
                f"{context.name}: no setting holds max_drop {100 * self._bound:.4g} %; "
                f"the best of {len(self._trials)} loses {100 * drop:.4g} %"
            )
        return self._best[1]


@contextmanager
def alone(graph: GraphModule, layers: Collection[Node], placement: Placement) -> Iterator[None]:
    """Let nothing of a quantized graph be quantized but what some layers read and give, for as long as it lasts."""
    kept = {node for layer in layers for source in layer.all_input_nodes for node in _quantizers(source)}
    given = {after_rectifier(layer) for layer in layers} & placement.exclusive
    kept |= {user for value in given for user in value.users if op_name(user) == "quantize_affine"}
    changed: list[tuple[Node, Node, Node]] = []
    for reader in list(graph.graph.nodes):
        for quantized in list(reader.all_input_nodes):
            exact = next((node for node in _quantizers(quantized) if node in kept), None)
            exact = _exact(quantized) if exact is None else exact
            if exact is not quantized and reader not in kept:
                reader.replace_input_with(quantized, exact)
                changed.append((reader, quantized, exact))
    graph.recompile()
    try:
        yield
    finally:
        for reader, quantized, exact in changed:
            reader.replace_input_with(exact, quantized)
        graph.recompile()


def _quantizers(value: Node) -> Iterator[Node]:
    """Yield the quantizers that a value has just gone through, the last one first."""
    while op_name(value) == "quantize_affine":
        yield value
        value = get_argument(value, "x")


def _exact(value: Node) -> Node:
    for quantizer in _quantizers(value):
        value = get_argument(quantizer, "x")
    return value
