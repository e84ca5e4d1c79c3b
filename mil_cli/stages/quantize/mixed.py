"""Mixed precision: the bits of each layer's weight are chosen by what they cost the loss, under a bound."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mil_cli.errors import StageError
from mil_cli.export.onnx import export_onnx
from mil_cli.export.qdq import storage_bits
from mil_cli.measure.size import size_bytes
from mil_cli.stages.knapsack import choose
from mil_cli.stages.quantize.placement import Layer, matches
from mil_cli.stages.quantize.post_training import PostTrainingConfig, Prepared, prepare
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.sensitivity import (
    Curves,
    Weight,
    estimated_rises,
    loss_when_rounded,
    measured_rises,
    weights_of,
)
from mil_cli.stages.quantize.settings import LayerSettings, QuantizationConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.stages.registry import StageConfig, stage
from mil_cli.stages.targets import SizeTarget, parse_size

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

Choice = tuple[int, ...]
"""By weight: the place of its width among those that it may have."""

_FILES = 6
"""How many choices are exported, at most, until a file keeps its bound."""

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
        sensitivity: What fewer bits cost: ``loss`` (the rise of the loss on val with one weight rounded),
            ``hessian`` (its estimate from the trace of the Hessian, without trying).
        samples: Samples that the sensitivity is taken on: of val, for the Hessian of train.
        probes: Random vectors from which the traces of the Hessian are estimated.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "mixed"
    never_after: ClassVar[dict[str, str]] = QuantizationConfig.never_after

    by: str | None = None
    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field((2, 4, 8), min_length=1)
    average_bits: float | None = Field(None, ge=2, le=8)
    size: SizeTarget | None = None
    sensitivity: Literal["loss", "hessian"] = "loss"
    samples: int = Field(1000, ge=1)
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


@stage(MixedConfig)
def mixed(model: Model, config: MixedConfig, context: Context) -> Model:
    """Choose the bits of each layer's weight so that together they cost the loss least under a bound, and quantize so.

    Costs of single weights are taken as adding up, and an integer programme chooses; by the curvature of the loss as
    Dong et al., HAWQ-V2 (2020), by measuring as Wu et al., Mixed Precision Quantization of ConvNets (2018), and others
    do. Activations keep the bits of the stage that quantizes: they take no room in the file, and run on the same
    kernels whatever bits they have.

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
    state = slot.load() or {"losses": [], "probes": [], "files": [], "together": []}

    def keep() -> None:
        slot.save(state)

    own, before = _settings(config, context), dict(context.notes)
    shared = StaticConfig.model_fields.keys() & type(own).model_fields.keys()
    static = StaticConfig.model_validate({name: getattr(own, name) for name in shared})
    prepared = prepare(model, static, context)
    weights = weights_of(prepared, lambda layer: _widths(layer, config, prepared))
    observer = static.weight_observer
    if config.sensitivity == "loss":
        curves = measured_rises(
            prepared, weights, observer, context, samples=config.samples, losses=state["losses"], keep=keep
        )
    else:
        limits = {"samples": config.samples, "probes": config.probes}
        curves = estimated_rises(prepared, weights, observer, context, **limits, found=state["probes"], keep=keep)
    search = _Search(prepared, weights, curves, static, context, config.samples, state, keep)
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
    context.note(**search.facts(chosen), sensitivity=config.sensitivity)
    return result


def _settings(config: MixedConfig, context: Context) -> QuantizationConfig:
    if config.by is None:
        return StaticConfig()
    own = context.settings_of(config.by)
    if not isinstance(own, QuantizationConfig):
        where = f"stages.{context.name}.by"
        hint = "name a quantize stage that has weight_bits, such as static or lsq"
        raise StageError(f"'{config.by}' is {own.key()}, which takes no bits by layer", where=where, hint=hint)
    if isinstance(own, PostTrainingConfig) and own.max_drop is not None:
        where, hint = f"stages.{config.by}.max_drop", "take max_drop out: it gives layers more bits than were chosen"
        raise StageError("mixed keeps a bound on bits, not on quality", where=where, value=own.max_drop, hint=hint)
    return own


def _widths(layer: Layer, config: MixedConfig, prepared: Prepared) -> Sequence[int]:
    """Return the bits that a layer's weight may have."""
    rules = prepared.rules
    fixed = [
        settings.weight_bits
        for pattern, settings in rules.layers.items()
        if settings.weight_bits is not None and matches(pattern, layer.name, layer.node.name)
    ]
    if fixed:
        return fixed[-1:]
    return [max(bits, rules.edge_bits) if layer.edge else bits for bits in config.bits]


@dataclass(frozen=True)
class _Search:
    """Chooses a width for each weight.

    Attributes:
        prepared: The float model.
        weights: Its weights.
        curves: What their widths add to the loss.
        static: By which settings files are made to be measured.
        context: Gives val and the device.
        samples: Samples of val that choices are compared on.
        state: What was measured of choices, each a pair of choice and figure: ``files``, the bytes of exported files,
            an empty choice being the float model, and ``together``, losses with all weights rounded.
        keep: Called after each new measurement.
    """

    prepared: Prepared
    weights: Sequence[Weight]
    curves: Curves
    static: StaticConfig
    context: Context
    samples: int
    state: dict[str, list[Any]]
    keep: Callable[[], None]

    def within_average(self, bound: float) -> Choice:
        """Return the best choice whose mean of bits keeps a bound."""
        bits = [np.array(weight.widths) * float(weight.numbers) for weight in self.weights]
        numbers = sum(weight.numbers for weight in self.weights)
        most = sum(float(axis[0]) for axis in bits)
        found = self._choose([axis[0] - axis for axis in bits], most - bound * numbers)
        if found is None:
            least = sum(float(axis[-1]) for axis in bits) / numbers
            raise self._unreachable("average_bits", bound, f"the smallest mean is {least:.4g} bits")
        return found

    def within_size(self, model: Model, size: str | float) -> Choice:
        """Return the best choice whose exported file keeps a bound.

        Files differ by the codes of their weights, and a little by how these are packed, which is measured.

        Args:
            model: The float model.
            size: The bound.
        """

        def measured(choice: Choice) -> int:
            return int(self._known("files", choice, lambda: self._file_bytes(model, choice)))

        kept = parse_size(size)
        bound = kept.resolve(1 if kept.absolute else measured(()))
        stored = [np.array([self._stored(codes) for codes in weight.codes]) for weight in self.weights]
        savings = [(axis[0] - axis) * weight.numbers / 8 for axis, weight in zip(stored, self.weights, strict=True)]
        widest = measured((0,) * len(self.weights))
        narrowest = tuple(len(weight.widths) - 1 for weight in self.weights)
        beyond = 0.0
        for _ in range(_FILES):
            found = self._choose(savings, widest + beyond - bound)
            if found is None:
                break
            if (taken := measured(found)) <= bound:
                return found
            saved = sum(float(axis[choice]) for axis, choice in zip(savings, found, strict=True))
            beyond = max(beyond + 1, taken - (widest - saved))
        if (taken := measured(narrowest)) <= bound:
            return narrowest
        raise self._unreachable("size", size, f"the smallest file has {taken:,} bytes")

    def _choose(self, savings: Sequence[NDArray[np.float64]], needed: float) -> Choice | None:
        """Return the best choice that saves enough, or None.

        Costs of single weights do not quite add up, and estimates may be off: the most bits that all weights alike may
        have are taken if the loss with all of them rounded says that they are better.
        """
        found = choose(self.curves, savings, needed)
        if found is None:
            return None
        for bits in sorted({bits for weight in self.weights for bits in weight.widths}, reverse=True):
            alike = tuple(int(np.argmin([abs(width - bits) for width in weight.widths])) for weight in self.weights)
            if sum(float(axis[place]) for axis, place in zip(savings, alike, strict=True)) >= needed:
                return min(found, alike, key=self._loss_together)
        return found

    def _loss_together(self, choice: Choice) -> float:
        def loss() -> float:
            changes = [(weight, weight.codes[place]) for weight, place in zip(self.weights, choice, strict=True)]
            observer = self.static.weight_observer
            return loss_when_rounded(self.prepared, changes, observer, self.context, samples=self.samples)

        return self._known("together", choice, loss)

    def _known(self, kind: str, choice: Choice, measure: Callable[[], float]) -> float:
        """Return what was measured of a choice, or is now."""
        for other, value in self.state[kind]:
            if tuple(other) == choice:
                return float(value)
        value = measure()
        self.state[kind].append([list(choice), value])
        self.keep()
        return value

    def _stored(self, codes: CodeRange) -> int:
        return storage_bits(codes.quant_min, codes.quant_max, self.context.device.weight_bits)

    def _file_bytes(self, model: Model, choice: Choice) -> int:
        if choice:
            config = self.static.model_copy(update={"layers": self.layers(choice, self.static.layers)})
            model = self.context.run(model, config, name="size")
        with TemporaryDirectory() as folder:
            return size_bytes(export_onnx(model, Path(folder) / "model.onnx", device=self.context.device).path)

    def _unreachable(self, key: str, bound: object, least: str) -> StageError:
        return StageError(
            f"the bound cannot be kept: {least}",
            where=f"stages.{self.context.name}.{key}",
            value=bound,
            hint="raise it, add fewer bits to `bits`, or lower first_last_bits of the stage that quantizes",
        )

    def layers(self, choice: Choice, own: Mapping[str, LayerSettings]) -> dict[str, LayerSettings]:
        """Return what the quantizing stage is told of its layers: its own, and the bits that were chosen."""
        result = dict(own)
        # Sorted: the path of a layer is also a pattern for those below it, whose own bits must come later.
        for weight, place in sorted(zip(self.weights, choice, strict=True), key=lambda pair: pair[0].layer.name):
            name = glob.escape(weight.layer.name)
            bits = {"weight_bits": weight.widths[place]}
            result[name] = result.get(name, LayerSettings()).model_copy(update=bits)
        return result

    def facts(self, choice: Choice) -> dict[str, Any]:
        """Return what the report shows of a choice."""
        numbers = sum(weight.numbers for weight in self.weights)
        bits = [weight.widths[place] * weight.numbers for weight, place in zip(self.weights, choice, strict=True)]
        rises = [float(curve[place]) for curve, place in zip(self.curves, choice, strict=True)]
        return {
            "weight_bits": f"{sum(bits) / numbers:.3g} on average",
            "average_bits": sum(bits) / numbers,
            "summed_loss": sum(rises),
            "sensitivities": [
                {"name": weight.layer.name, "bits": list(weight.widths), "added_loss": _finite(curve)}
                for weight, curve in zip(self.weights, self.curves, strict=True)
            ],
        }


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
