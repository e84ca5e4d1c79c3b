"""The settings that all methods of quantization share, and what they mean on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from mil_cli.stages.context import Context
from mil_cli.stages.quantize.placement import Policy
from mil_cli.stages.quantize.ranges import CodeRange, activation_codes, weight_codes
from mil_cli.stages.registry import StageConfig


class QuantizationConfig(StageConfig):
    """Settings of a method that puts quantizers before and after the layers of a model.

    Attributes:
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits in which layers read activations, 2 to 8; what lies between them, such as residual sums,
            keeps `first_last_bits` if that is more.
        first_last_bits: Bits of layers right after an input or right before an output, of their weights and of the
            activations that they read, and of the outputs themselves where they are quantized; if that is more than
            the others have: they are the most sensitive.
        calibration_samples: How many training samples are looked at, without augmentation.
        calibration_batch_size: How many of them at once.
        per_channel: Whether each output channel has a scale of its own; None: as the device says.
        activations: Unsigned or signed codes; None: as the device says.
        reduce_range: Whether 8-bit weights keep to [-64, 64]; None: as the device says.
        policy: Which values are quantized; ``auto`` decides by the graph; None: as the device says.
        skip: Layers to leave float: module paths (with all below), node names, or patterns with ``*``.
    """

    family: ClassVar[str] = "quantize"
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=8)
    first_last_bits: int = Field(8, ge=2, le=8)
    calibration_samples: int = Field(512, ge=1)
    calibration_batch_size: int = Field(64, ge=1)
    per_channel: bool | None = None
    activations: Literal["uint8", "int8"] | None = None
    reduce_range: bool | None = None
    policy: Literal["auto", "cnn", "transformer"] | None = None
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The settings with the device's rules in place of what the recipe leaves open.

    Attributes:
        signed: Whether activations have signed codes.
        per_channel: Whether each output channel of a weight has a scale of its own.
        reduce_range: Whether 8-bit weights keep to [-64, 64].
        policy: Which values are quantized.
        weight_bits: Bits of weights.
        activation_bits: Bits of activations.
        edge_bits: Bits of either at an input or output of the model, if that is more.
    """

    signed: bool
    per_channel: bool
    reduce_range: bool
    policy: Literal["auto"] | Policy
    weight_bits: int
    activation_bits: int
    edge_bits: int

    @classmethod
    def of(cls, config: QuantizationConfig, context: Context) -> Rules:
        """Fill in what the recipe leaves open."""
        device: Any = context.device.int8
        activations = device.activations if config.activations is None else config.activations
        return cls(
            signed=activations == "int8",
            per_channel=device.per_channel if config.per_channel is None else config.per_channel,
            reduce_range=device.reduce_range if config.reduce_range is None else config.reduce_range,
            policy=device.policy if config.policy is None else config.policy,
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            edge_bits=config.first_last_bits,
        )

    def facts(self) -> dict[str, object]:
        """Return what the report shows."""
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "first_last_bits": self.edge_bits,
            "per_channel": self.per_channel,
            "reduce_range": self.reduce_range,
        }

    def weights(self, *, edge: bool) -> CodeRange:
        """Return the codes of a weight; `edge`: of a first or last layer."""
        bits = max(self.weight_bits, self.edge_bits) if edge else self.weight_bits
        return weight_codes(bits, reduce_range=self.reduce_range)

    @property
    def narrow(self) -> bool:
        """Whether layers read fewer bits than what lies between them keeps."""
        return self.activation_bits < self.edge_bits

    def values(self, *, narrow: bool) -> CodeRange:
        """Return the codes of an activation; `narrow`: as layers but the first and last read it."""
        bits = self.activation_bits if narrow else max(self.activation_bits, self.edge_bits)
        return activation_codes(bits, signed=self.signed)
