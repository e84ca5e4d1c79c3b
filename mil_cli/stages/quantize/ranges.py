"""From a range of values to the scale and zero point of integer codes."""

from __future__ import annotations

from dataclasses import dataclass

from mil_cli.ops.learned_scale import SMALLEST_SCALE


@dataclass(frozen=True)
class CodeRange:
    """The integer codes that a value may take.

    Attributes:
        quant_min: The smallest code.
        quant_max: The largest code.
    """

    quant_min: int
    quant_max: int

    @property
    def steps(self) -> int:
        """How many steps lie between the smallest and the largest code."""
        return self.quant_max - self.quant_min

    @property
    def bits(self) -> int:
        """How many bits tell all codes apart."""
        return self.steps.bit_length()

    def symmetric(self) -> CodeRange:
        """Return the codes that have a mirror image."""
        largest = min(self.quant_max, -self.quant_min)
        return CodeRange(-largest, largest)


def activation_codes(bits: int, *, signed: bool) -> CodeRange:
    """Return the codes of activations: ``[0, 2^bits - 1]``, or ``[-2^(bits-1), 2^(bits-1) - 1]`` if signed."""
    if signed:
        return CodeRange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return CodeRange(0, 2**bits - 1)


def weight_codes(bits: int, *, reduce_range: bool) -> CodeRange:
    """Return the codes of weights, whose zero point is 0.

    Below 8 bits these are all that the bits hold, ``[-2^(bits-1), 2^(bits-1) - 1]``: at 2 bits three codes would be too
    few. With 8 bits they are symmetric, [-127, 127], as integer kernels expect; with a reduced range [-64, 64]: pairs
    of products of unsigned activations and signed weights then fit into 16 bits, where instruction sets without VNNI
    would saturate.
    """
    if bits == 8:
        return CodeRange(-64, 64) if reduce_range else CodeRange(-127, 127)
    return CodeRange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def affine_parameters(low: float, high: float, codes: CodeRange) -> tuple[float, int]:
    """Return the scale and zero point with which `codes` span ``[low, high]``; 0.0 always has a code of its own.

    A range that starts at 0 has the smallest code as its zero point, so that a rectifier before it costs nothing.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / codes.steps, SMALLEST_SCALE)
    zero_point = round(codes.quant_min - low / scale)
    return scale, min(max(zero_point, codes.quant_min), codes.quant_max)
