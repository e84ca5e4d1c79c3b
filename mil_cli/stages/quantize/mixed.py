"""Mixed precision: the bits of each layer's weight are chosen by what they cost the loss, under a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from mil_cli.errors import StageError
from mil_cli.stages.quantize.allocation import Search
from mil_cli.stages.quantize.layers import Layer, matches
from mil_cli.stages.quantize.post_training import Prepared, prepare
from mil_cli.stages.quantize.sensitivity import Rounding, estimated_rises, measured_rises, weights_of
from mil_cli.stages.quantize.settings import QuantizationConfig, shared_settings
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import StageConfig, stage
from mil_cli.stages.targets import SizeTarget

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_LATENCY = (
    "the bits of weights do not change a latency: onnxruntime computes weights of 2 to 8 bits on the same int8 "
    "kernels; bound average_bits or size"
)


class MixedConfig(StageConfig):
    """Settings of ``quantize/mixed``; give one of `average_bits` and `size`.

    Attributes:
        by: Key of a quantize stage of the recipe: its settings are those of everything but the bits of weights, and it
            makes the result, so that ``lsq`` can train it; None: ``quantize/static`` as it is by itself.
        bits: Bits that a weight may have, each from 2 to 8. First and last layers have that stage's `first_last_bits`
            at least, and a layer whose bits its `layers` names has these.
        average_bits: Largest mean of the bits of all quantized weights, each number counting once.
        size: Largest exported file: a size such as ``100 kB``, or a ratio of the file of the model before the stage.
        sensitivity: What fewer bits cost: ``outputs`` (how far the outputs are off with one weight rounded, by the
            task's distance, which distillation minimises too), ``loss`` (how much the task's loss rises then),
            ``hessian`` (an estimate of that from the trace of the Hessian).
        exchanges: How many times, at most, bits pass from some weights to another where that costs less with all
            weights rounded.
        samples: Samples that the sensitivity is taken on: of val, for the Hessian of train.
        probes: Random vectors from which the traces of the Hessian are estimated.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "mixed"
    version: ClassVar[int] = 7
    never_after: ClassVar[dict[str, str]] = QuantizationConfig.never_after

    by: str | None = None
    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field((2, 4, 8), min_length=1)
    average_bits: float | None = Field(None, ge=2, le=8)
    size: SizeTarget | None = None
    sensitivity: Literal["outputs", "loss", "hessian"] = "outputs"
    exchanges: int = Field(10, ge=0)
    samples: int = Field(2000, ge=1)
    probes: int = Field(32, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _no_latency(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("latency") is not None:
            raise ValueError(_LATENCY)
        return values

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.average_bits is None) == (self.size is None):
            raise ValueError("give exactly one of average_bits and size")
        return self

    def check_by(self, other: StageConfig, *, name: str) -> None:
        """Refuse a stage that takes no bits by layer, or that changes them by itself."""
        if not isinstance(other, QuantizationConfig):
            hint = "name a quantize stage that has weight_bits, such as static or lsq"
            what = f"'{self.by}' is {other.key()}, which takes no bits by layer"
            raise StageError(what, where=f"stages.{name}.by", value=self.by, hint=hint)
        if other.max_drop is not None:
            where, hint = f"stages.{self.by}.max_drop", "take max_drop out: it gives layers more bits than were chosen"
            raise StageError(
                "mixed keeps a bound on bits, not on quality", where=where, value=other.max_drop, hint=hint
            )
        if other.latency_aware:
            where, hint = (
                f"stages.{self.by}.latency_aware",
                "take it out, and name layers that are to stay float in skip",
            )
            raise StageError("mixed gives bits to all layers that can be quantized", where=where, value=True, hint=hint)


@stage(MixedConfig)
def mixed(model: Model, config: MixedConfig, context: Context) -> Model:
    """Choose the bits of each layer's weight so that together they cost the loss least under a bound, and quantize so.

    Costs of single weights are taken as adding up, and an integer programme chooses, as in Hubara et al., Accurate Post
    Training Quantization with Small Calibration Sets (2021), where they are measured, and in Yao et al., HAWQ-V3
    (2021), where the curvature of the loss gives them. But costs do not quite add up: what the programme chose, or the
    one width for all that keeps the bound if that costs less, is improved by exchanges of bits between weights, each
    measured with all weights rounded. Activations keep the bits of the stage that quantizes: they take
    no room in the file, and run on the same kernels whatever bits they have.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, the stage that quantizes, and checkpoints.

    Returns:
        The quantized model.

    Raises:
        StageError: The bound cannot be kept, the stage `by` does not quantize, or what that stage raises.
    """
    slot = context.slot("sensitivity")
    state = slot.load() or {"costs": [], "probes": [], "files": [], "together": []}

    def keep() -> None:
        slot.save(state)

    own, before = _settings(config, context), dict(context.notes)
    static = StaticConfig.model_validate(shared_settings(own, StaticConfig))
    few = min(config.bits) < 8
    corrected = few if static.bias_correction is None else static.bias_correction
    prepared = prepare(model, static.model_copy(update={"bias_correction": corrected}), context, fold=own.fold)
    weights = weights_of(prepared, lambda layer: _widths(layer, config, prepared))
    rounding = Rounding(prepared, static, context, config.samples)
    cost = rounding.distance if config.sensitivity == "outputs" else rounding.loss
    if config.sensitivity == "hessian":
        found = state["probes"]
        curves = estimated_rises(weights, rounding, context, probes=config.probes, found=found, keep=keep)
    else:
        curves = measured_rises(weights, cost, context, costs=state["costs"], keep=keep)
    search = Search(weights, curves, cost, static, context, state, keep, config.exchanges)
    if config.average_bits is not None:
        chosen = search.within_average(config.average_bits)
    else:
        chosen = search.within_size(model, config.size or 0)
    context.notes.clear()  # what was tried on the way is not what is made
    context.notes.update(before)
    layers = search.layers(chosen, own.layers)
    if config.by is None:
        result = context.run(model, StaticConfig(layers=layers), name="result")
    else:
        result = context.run_stage(model, stage=config.by, name="result", settings={"layers": layers})
        if config.size is not None:
            search.tell_if_larger(result, model, config.size)
    context.note(**search.facts(chosen), sensitivity=config.sensitivity)
    return result


def _settings(config: MixedConfig, context: Context) -> QuantizationConfig:
    if config.by is None:
        return StaticConfig()
    own = context.settings_of(config.by)
    config.check_by(own, name=context.name)
    return cast("QuantizationConfig", own)


def _widths(layer: Layer, config: MixedConfig, prepared: Prepared) -> Sequence[int]:
    """Return the bits that a layer's weight may have."""
    rules = prepared.rules
    named = [pattern for pattern, settings in rules.layers.items() if settings.weight_bits is not None]
    if any(matches(pattern, each.name, each.alias) for pattern in named for each in layer.sharing):
        return [rules.of_layer(layer).weight_bits]
    edge = any(each.edge for each in layer.sharing)
    return [max(bits, rules.edge_bits) if edge else bits for bits in config.bits]
