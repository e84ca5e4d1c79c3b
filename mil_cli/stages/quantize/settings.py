"""The settings that all methods of quantization share, and what they mean on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator
from torch.fx import Node

from mil_cli.device.profile import Int8Form
from mil_cli.errors import StageError, did_you_mean
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.holding import BoundedConfig
from mil_cli.stages.quantize.layers import Layer, left_float, matches
from mil_cli.stages.quantize.observers import Observer, ObserverName, make_observer
from mil_cli.stages.quantize.placement import Placement, Policy
from mil_cli.stages.quantize.ranges import CodeRange, activation_codes, weight_codes
from mil_cli.stages.quantize.settle import fold_weights


class LayerSettings(BaseModel):
    """What some layers have instead of what the others have; None: as the others.

    Attributes:
        weight_bits: Bits of their weights, 2 to 8; of first and last layers too, whatever `first_last_bits` says. A
            weight that several layers read has the most that any of them asks for.
        activation_bits: Bits in which they read activations, 2 to 8; likewise.
        per_channel: Whether each of their output channels has a scale of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: int | None = Field(None, ge=2, le=8)
    activation_bits: int | None = Field(None, ge=2, le=8)
    per_channel: bool | None = None


class QuantizationConfig(BoundedConfig):
    """Settings of a method that puts quantizers before and after the layers of a model.

    Attributes:
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits in which layers read activations, 2 to 8; what lies between them, such as residual sums,
            keeps `first_last_bits` if that is more.
        first_last_bits: Bits of layers right after an input or right before an output, of their weights and of the
            activations that they read, and of the outputs themselves where they are quantized; if that is more than
            the others have: they are the most sensitive. None: as the device says. Tables of embeddings have
            `weight_bits`.
        embeddings: Whether tables of embeddings are quantized too, each row with a scale of its own; None: as the
            device says.
        calibration_samples: How many training samples are looked at, without augmentation.
        calibration_batch_size: How many of them at once.
        per_channel: Whether each output channel has a scale of its own; None: as the device says.
        activations: Unsigned or signed codes; None: as the device says.
        reduce_range: Whether 8-bit weights keep to [-64, 64]; None: as the device says.
        policy: Which values are quantized; ``auto`` decides by the graph; None: as the device says.
        layers: Settings of some layers in place of those of all, by pattern as in `skip`; later patterns win. Those
            that read one value in fewer bits than it keeps elsewhere read it in the most that any of them asks for.
        latency_aware: Whether layers that the device is no faster at with integers stay float: it is measured what
            operators and whole files take. If no file with integers is faster than the float one, nothing is quantized.
    """

    family: ClassVar[str] = "quantize"
    version: ClassVar[int] = 6
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=8)
    first_last_bits: int | None = Field(None, ge=2, le=8)
    embeddings: bool | None = None
    calibration_samples: int = Field(512, ge=1)
    calibration_batch_size: int = Field(64, ge=1)
    per_channel: bool | None = None
    activations: Literal["uint8", "int8"] | None = None
    reduce_range: bool | None = None
    policy: Literal["auto", "cnn", "transformer"] | None = None
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    latency_aware: bool = False

    def fold(self, model: Model) -> Model:
        """Return a copy of a float model whose layers are those that the method quantizes, batch norms folded."""
        return fold_weights(model)

    @field_validator("layers", mode="before")
    @classmethod
    def _from_pairs(cls, value: Any) -> Any:
        pairs = isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        return dict(value) if pairs else value

    @field_serializer("layers", when_used="json")
    def _to_pairs(self, value: dict[str, LayerSettings]) -> list[tuple[str, dict[str, Any]]]:
        """Keep the order, which matters, where the keys of mappings are sorted: in fingerprints."""
        return [(pattern, settings.model_dump(exclude_none=True)) for pattern, settings in value.items()]


def shared_settings(config: QuantizationConfig, kind: type[QuantizationConfig]) -> dict[str, Any]:
    """Return those settings of a method that another kind of settings has too."""
    return {name: getattr(config, name) for name in kind.model_fields.keys() & type(config).model_fields.keys()}


class ObservedConfig(QuantizationConfig):
    """Settings of a method that finds the ranges of activations by an observer.

    Attributes:
        observer: How the range of activations is found: ``min_max`` (all that was seen), ``moving_average`` (of each
            batch's), ``percentile`` (outliers clipped), ``mse`` (smallest squared error), ``entropy`` (least change of
            the distribution).
        percentile: For the percentile observer, in percent.
    """

    observer: ObserverName = "mse"
    percentile: float = Field(99.99, gt=50, le=100)

    def watcher(self, codes: CodeRange) -> Observer:
        """Return what watches an activation with such codes in calibration."""
        return make_observer(self.observer, codes=codes, percentile=self.percentile)


@dataclass(frozen=True)
class Rules:
    """The settings with the device's rules in place of what the recipe leaves open.

    Attributes:
        signed: Whether activations have signed codes.
        per_channel: Whether each output channel of a weight has a scale of its own, unless `layers` says else.
        reduce_range: Whether 8-bit weights keep to [-64, 64].
        policy: Which values are quantized.
        weight_bits: Bits of weights, unless `layers` says else.
        activation_bits: Bits in which layers read activations, unless `layers` says else.
        edge_bits: Bits of either at an input or output of the model, if that is more.
        never: Operator -> why it stays float, as the device says and the settings do of tables.
        layers: Pattern -> what the layers that it fits have instead; later ones win.
    """

    signed: bool
    per_channel: bool
    reduce_range: bool
    policy: Literal["auto"] | Policy
    weight_bits: int
    activation_bits: int
    edge_bits: int
    never: Mapping[str, str]
    layers: Mapping[str, LayerSettings] = field(default_factory=dict)

    @classmethod
    def of(cls, config: QuantizationConfig, context: Context) -> Rules:
        """Fill in what the recipe leaves open."""
        return cls.on(config, context.device.int8)

    @classmethod
    def on(cls, config: QuantizationConfig, device: Int8Form) -> Rules:
        """Fill in what the settings leave open by the int8 form of a device."""
        return cls(
            signed=(device.activations if config.activations is None else config.activations) == "int8",
            per_channel=device.per_channel if config.per_channel is None else config.per_channel,
            reduce_range=device.reduce_range if config.reduce_range is None else config.reduce_range,
            policy=device.policy if config.policy is None else config.policy,
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            edge_bits=device.first_last_bits if config.first_last_bits is None else config.first_last_bits,
            never=left_float(device, tables=device.embeddings if config.embeddings is None else config.embeddings),
            layers=config.layers,
        )

    def at_least(self, bits: int) -> Rules:
        """Return the same with so many bits wherever weights or activations have fewer."""
        layers = {
            pattern: settings.model_copy(
                update={
                    name: max(bits, asked)
                    for name in ("weight_bits", "activation_bits")
                    if (asked := getattr(settings, name)) is not None
                }
            )
            for pattern, settings in self.layers.items()
        }
        weight_bits, activation_bits = max(bits, self.weight_bits), max(bits, self.activation_bits)
        return replace(self, weight_bits=weight_bits, activation_bits=activation_bits, layers=layers)

    def facts(self) -> dict[str, object]:
        """Return what the report shows."""
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "first_last_bits": self.edge_bits,
            "per_channel": self.per_channel,
            "reduce_range": self.reduce_range,
        }

    def of_layer(self, layer: Layer) -> LayerRules:
        """Return what a layer has; of its weight, what serves all that share it."""
        asked = [self._asked(each) for each in layer.sharing]
        return replace(
            asked[0],
            weight_bits=max(each.weight_bits for each in asked),
            per_channel=all(each.per_channel for each in asked),
        )

    def _asked(self, layer: Layer) -> LayerRules:
        asked: dict[str, Any] = {}
        for pattern, settings in self.layers.items():
            if matches(pattern, layer.name, layer.alias):
                asked.update(settings.model_dump(exclude_none=True))
        least = self.edge_bits if layer.edge else 0
        return LayerRules(
            asked.get("weight_bits", max(self.weight_bits, least)),
            asked.get("activation_bits", max(self.activation_bits, least)),
            asked.get("per_channel", self.per_channel or layer.looks_up),
        )

    def layer_facts(self, placement: Placement) -> list[dict[str, object]]:
        """Return what the report shows of each layer: its name and bits."""

        def facts(layer: Layer) -> dict[str, object]:
            rules = asdict(self.of_layer(layer))
            return {name: value for name, value in rules.items() if name != "activation_bits" or not layer.looks_up}

        return [{"name": layer.name, **facts(layer)} for layer in placement.layers]

    def check_used(self, placement: Placement) -> None:
        """Refuse a pattern of `layers` that fits no layer, quantized or float.

        Raises:
            StageError: Names it.
        """
        for pattern in self.layers:
            if not any(matches(pattern, name, alias) for alias, name in placement.names.items()):
                hint = did_you_mean(pattern, placement.names.values())
                raise StageError(f"'{pattern}' fits no layer", where="layers", value=list(self.layers), hint=hint)

    def weights(self, layer: Layer) -> CodeRange:
        """Return the codes of a layer's weight."""
        return self.codes(layer, self.of_layer(layer).weight_bits)

    def codes(self, layer: Layer, bits: int) -> CodeRange:
        """Return the codes that a layer's weight would have with so many bits; nothing multiplies those of a table."""
        multiplied = not all(each.looks_up for each in layer.sharing)
        return weight_codes(bits, reduce_range=self.reduce_range and multiplied)

    def axis(self, layer: Layer) -> int | None:
        """Return the axis of a layer's weight along which scales differ, or None for one scale."""
        return layer.axis if self.of_layer(layer).per_channel else None

    @property
    def all_per_channel(self) -> bool:
        """Whether each output channel of every layer has a scale of its own."""
        return self.per_channel and all(settings.per_channel is not False for settings in self.layers.values())

    @property
    def largest_weight(self) -> int:
        """The largest code of a weight that integer kernels take."""
        return weight_codes(8, reduce_range=self.reduce_range).quant_max

    def narrow(self, layer: Layer) -> bool:
        """Whether a layer reads fewer bits than what lies between layers keeps."""
        return self.of_layer(layer).activation_bits < self._between

    def values(self, placement: Placement, value: Node, *, narrow: bool) -> CodeRange:
        """Return the codes of an activation; `narrow`: as layers read it that want fewer bits than it keeps."""
        if narrow:
            readers = [layer for layer in placement.layers if layer.node in placement.narrow[value]]
            bits = 0
        else:
            apart = {node for nodes in placement.narrow.values() for node in nodes}
            readers = [layer for layer in placement.products if layer.node not in apart]
            readers = [layer for layer in readers if placement.owner(layer.source) is value]
            bits = self._between
        bits = max([bits, *(self.of_layer(layer).activation_bits for layer in readers)])
        return activation_codes(bits, signed=self.signed)

    @property
    def _between(self) -> int:
        return max(self.activation_bits, self.edge_bits)


@dataclass(frozen=True)
class LayerRules:
    """What one layer has.

    Attributes:
        weight_bits: Bits of its weight.
        activation_bits: Bits in which it reads its activation, unless another layer that reads the same one has more.
        per_channel: Whether each output channel of its weight has a scale of its own.
    """

    weight_bits: int
    activation_bits: int
    per_channel: bool
