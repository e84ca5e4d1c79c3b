"""What a stage, an export or a measurement needs to know of the target: one frozen, versioned profile."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PROFILE_VERSION: Final = 1
"""The version of the profile's fields; a profile of another version is refused."""

ProviderOption = str | int | float | bool


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Requirements(_Part):
    """What a machine must have to run on this profile.

    Attributes:
        isa: Instruction sets by their names in Linux' ``/proc/cpuinfo``, such as ``avx2`` or ``avx512_vnni``.
        packages: Python packages as pip writes them, such as ``onnxruntime>=1.20``.
    """

    isa: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


class Int8Form(_Part):
    """The form of int8 models that the target's kernels are fast and exact on.

    Attributes:
        activations: The type of quantized activations.
        weights: The type of quantized weights.
        reduce_range: Whether weights use 7 of their 8 bits, because the kernels' 16-bit sums would saturate.
        per_channel: Whether each output channel has its own weight scale.
        embeddings: Whether tables of embeddings are quantized too; their rows are looked up as integers.
        policy: Where quantizers are placed. ``cnn``: at every input and output of convolutions, additions and linear
            layers; ``transformer``: at the inputs of linear layers only; ``auto``: the graph decides.
        left_float: Operators with weights that stay float, such as those that the target has no integer kernels for.
        first_last_bits: Bits of layers right after an input or right before an output, if that is more than the others
            have.
    """

    activations: Literal["uint8", "int8"]
    weights: Literal["int8"] = "int8"
    reduce_range: bool
    per_channel: bool = True
    embeddings: bool = True
    policy: Literal["auto", "cnn", "transformer"] = "auto"
    left_float: tuple[Literal["conv1d", "conv2d", "conv3d", "linear", "matmul"], ...] = ()
    first_last_bits: int = Field(8, ge=2, le=8)

    def leaves_float(self, operator: str) -> bool:
        """Whether calls of one of torch's operators stay float; ``mm`` is a ``matmul``."""
        return ("matmul" if operator == "mm" else operator) in self.left_float


class PreferredMultiple(_Part):
    """Channel counts that the kernels like; others cost as much as the next multiple, or more.

    Attributes:
        float: Channels of float layers are rounded to a multiple of this.
        int8: Channels of layers that are to be quantized are.
    """

    float: int = Field(8, ge=1, le=1024)
    int8: int = Field(16, ge=1, le=1024)


def _rising(widths: tuple[int, ...]) -> tuple[int, ...]:
    if not widths:
        raise ValueError("a device has at least one width of weights")
    return tuple(sorted(set(widths)))


class DeviceProfile(_Part):
    """A target device.

    Attributes:
        version: The version of these fields.
        name: The profile's name.
        description: One sentence for people.
        provider: onnxruntime's execution provider.
        provider_options: Its options.
        threads: Threads that one inference uses.
        requires: What a machine must have to run on this profile.
        int8: The form of int8 models.
        weight_bits: Widths in bits that weights can have on the target, in rising order.
        preferred_multiple: Channel counts that the kernels like.
        price_per_hour: Price of one hour of the device, in any one currency; None: unknown.
        watts: Power that the device draws under load, in watts; None: unknown.
        remote: Where the device is reached; None: it is this machine.
    """

    version: Literal[1] = PROFILE_VERSION
    name: str = Field(min_length=1)
    description: str = ""
    provider: str = Field("CPUExecutionProvider", min_length=1)
    provider_options: dict[str, ProviderOption] = Field(default_factory=dict)
    threads: int = Field(1, ge=1, le=1024)
    requires: Requirements = Field(default_factory=Requirements)
    int8: Int8Form
    weight_bits: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], ...], AfterValidator(_rising)] = (2, 3, 4, 8)
    preferred_multiple: PreferredMultiple = Field(default_factory=lambda: PreferredMultiple(float=8, int8=16))
    price_per_hour: float | None = Field(None, gt=0, allow_inf_nan=False)
    watts: float | None = Field(None, gt=0, allow_inf_nan=False)
    remote: str | None = None

    def field_fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of each field's value, so that a result can depend on the fields that it read."""
        return {name: _digest(value) for name, value in self.model_dump(mode="json").items()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that can change a result: every field but the description."""
        return _digest({name: text for name, text in self.field_fingerprints().items() if name != "description"})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
