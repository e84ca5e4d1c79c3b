"""Quantization of the layers that gain time by it: the others stay float, so that no file is slower than before."""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mil_cli.errors import ModelError
from mil_cli.graph.functional import make_functional
from mil_cli.measure.operators import OperatorTable
from mil_cli.stages.measured import latency_ratios
from mil_cli.stages.quantize.gains import gaining_layers
from mil_cli.stages.quantize.placement import place_any
from mil_cli.stages.quantize.post_training import PostTrainingConfig, prepare
from mil_cli.stages.quantize.settings import QuantizationConfig, Rules, shared_settings

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

F = TypeVar("F", bound=Callable[..., "Model"])

_SAMPLES = 64
"""Calibration samples of files that are only timed."""

_SLOWER = "it is no faster with integers on this device"


def where_faster(quantize: F) -> F:
    """Make a method of quantization leave layers float that gain no time, where its settings ask for it.

    Args:
        quantize: The method's function; its settings are a `QuantizationConfig`.

    Returns:
        A function that decides first, and then runs the method.
    """

    @wraps(quantize)
    def aware(model: Model, config: QuantizationConfig, context: Context) -> Model:
        if not config.latency_aware:
            return quantize(model, config, context)
        chosen, ratios = _choose(model, config, context)
        facts = {"latency_ratios": ratios, "left_for_latency": chosen}
        if chosen is None:
            context.note(**facts, quantized_layers=0)
            context.progress.notice(
                f"{context.name}: no file with integers is faster than the float one on {context.device.name}: "
                "nothing is quantized; quantize/weight_only makes the file smaller"
            )
            return model.clone()
        skip = (*config.skip, *map(glob.escape, chosen))
        result = quantize(model, config.model_copy(update={"skip": skip, "latency_aware": False}), context)
        context.note(**facts)
        kept = context.notes.get("kept_float")
        if isinstance(kept, dict):
            context.notes["kept_float"] = {**kept, **dict.fromkeys(chosen, _SLOWER)}
        return result

    return cast("F", aware)


def _choose(model: Model, config: QuantizationConfig, context: Context) -> tuple[list[str] | None, dict[str, float]]:
    """Return which layers to leave float, None for all of them, and what was measured, as shares of the float latency.

    Tried are all that can be quantized, and those that gain by the latencies of single operators; whole files decide.
    """
    slot = context.slot("latency_aware")
    state: dict[str, Any] = slot.load() or {"table": {}, "slow": None, "ratios": None}
    if state["slow"] is None:
        state["slow"] = _slow_layers(model, config, context, state["table"])
        slot.save(state)
    tries: dict[str, list[str]] = {"all layers": []}
    if state["slow"]:
        tries["layers that gain"] = state["slow"]
    if state["ratios"] is None:
        models = [_timed(model, config, context, skipped) for skipped in tries.values()]
        state["ratios"] = latency_ratios(models, model, context)
        slot.save(state)
    ratios = dict(zip(tries, state["ratios"], strict=True))
    best = min(ratios, key=ratios.__getitem__)
    return (tries[best] if ratios[best] <= 1 else None), ratios


def _slow_layers(model: Model, config: QuantizationConfig, context: Context, known: dict[str, float]) -> list[str]:
    """Return the layers that gain nothing by the latencies of single operators; none if that cannot be told.

    Args:
        model: The float model.
        config: The settings.
        context: Gives the device and progress.
        known: Takes the latencies that were measured.
    """
    folded = config.fold(model)
    make_functional(folded.graph)
    rules = Rules.of(config, context)
    placement = place_any(folded.graph, policy=rules.policy, skip=config.skip, never=rules.never)
    table = OperatorTable(context.device, progress=context.progress)
    try:
        gaining = gaining_layers(folded, placement, table)
    except ModelError as error:
        context.progress.notice(f"{context.name}: single layers cannot be timed: {error}")
        return []
    known.update(table.known)
    slow = [layer.name for layer in placement.products if layer.name not in gaining]
    return [] if len(slow) == len(placement.products) else list(dict.fromkeys(slow))


def _timed(model: Model, config: QuantizationConfig, context: Context, skipped: list[str]) -> Model:
    """Return the model as the settings quantize it but for some layers, its ranges only guessed: they take no time."""
    shared = shared_settings(config, PostTrainingConfig)
    skip = (*config.skip, *map(glob.escape, skipped))
    quick = {"skip": skip, "observer": "min_max", "weight_observer": "min_max", "bias_correction": False}
    samples = min(config.calibration_samples, _SAMPLES)
    before = dict(context.notes)
    settings = PostTrainingConfig.model_validate({**shared, **quick, "calibration_samples": samples})
    result = prepare(model, settings, context, fold=config.fold).insert()
    context.notes.clear()
    context.notes.update(before)
    return result
