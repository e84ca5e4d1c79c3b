"""Proves that an ONNX file computes what its torch model computes, on real batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mil_cli.errors import ExportError
from mil_cli.export.session import OnnxModel
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.ops import QUANTIZERS

FLOAT_TOLERANCE = 1e-4
"""Largest difference of a float file, relative to the outputs' largest magnitude."""

QUANTIZED_TOLERANCE = 0.01
"""Root mean square difference of a quantized file, relative to the outputs', that is always accepted."""

NOISE_TOLERANCE = 2.0
"""How many times the rounding noise of the quantized model the file may differ from it.

Two correct evaluations of a quantized model differ where a value lies next to a rounding threshold, and every such step
can push others over theirs; at worst they are as two independent roundings, 1.41 times the noise. Kernels that
saturate were measured at 1.8 to 4.5 times.
"""


@dataclass(frozen=True)
class Parity:
    """How close a file is to its model.

    Attributes:
        max_abs_diff: The largest absolute difference of any output value.
        samples: How many samples were compared.
        max_magnitude: The largest absolute output value of the model.
        relative_rms: Root mean square of the differences over that of the outputs.
        differing_fraction: The share of output values that differ by more than the float tolerance.
        quantized: Whether the model holds quantizers; one step of difference is then to be expected.
        noise_ratio: Root mean square of the differences over that of the model's own rounding noise (its outputs with
            quantizers less those without); None where there is none, as in a float model, or where all weights are on
            their codes and nothing else is rounded.
    """

    max_abs_diff: float
    samples: int
    max_magnitude: float
    relative_rms: float
    differing_fraction: float
    quantized: bool
    noise_ratio: float | None

    def problem(self) -> str | None:
        """Return what is wrong, or None if the file may stand for the model."""
        if not math.isfinite(self.max_abs_diff):
            return "the outputs hold NaN or infinity where they should not"
        if not self.quantized:
            bound = FLOAT_TOLERANCE * max(self.max_magnitude, 1e-3)
            return (
                None if self.max_abs_diff <= bound else f"it differs by {self.max_abs_diff:.3g}, {bound:.3g} is allowed"
            )
        if self.relative_rms <= QUANTIZED_TOLERANCE:
            return None
        differs = f"it differs by {100 * self.relative_rms:.2g} % (root mean square)"
        if self.noise_ratio is None:
            return f"{differs}, and the model's own rounding changes nothing"
        if self.noise_ratio <= NOISE_TOLERANCE:
            return None
        return (
            f"{differs}, {self.noise_ratio:.2g} times the model's own rounding noise; {NOISE_TOLERANCE:g} times is "
            "allowed"
        )


def check_parity(
    model: Model,
    onnx_path: Path,
    batches: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    threads: int = 1,
    strict: bool = True,
) -> Parity:
    """Run a model and its file on the same batches and compare every output value.

    Args:
        model: The model that was exported, float or quantized.
        onnx_path: Its file.
        batches: The (args, kwargs) of each batch.
        threads: Threads for onnxruntime.
        strict: Whether a difference beyond the tolerances raises.

    Raises:
        ExportError: There are no batches, or the file does not compute what the model computes.
    """
    runner = OnnxModel(onnx_path, model.spec, threads=threads)
    reference = model.clone().eval() if model.training else model
    unquantized = without_quantizers(reference)
    quantized = unquantized is not None
    totals = _Totals()
    with torch.no_grad():
        for args, kwargs in batches:
            expected = reference.flatten_outputs(reference(*args, **kwargs))
            found = reference.flatten_outputs(runner(*args, **kwargs))
            floats = expected
            if unquantized is not None:
                floats = unquantized.flatten_outputs(unquantized(*args, **kwargs))
            totals.add(expected, found, floats, samples=_samples(model, args, kwargs))
    if not totals.samples:
        raise ExportError("parity needs at least one batch", hint="check that the data is not empty")
    parity = totals.result(quantized=quantized)
    problem = parity.problem()
    if strict and problem is not None:
        hint = (
            "set stages.<quantize stage>.reduce_range=true, or choose the device profile of this machine: integer "
            "kernels without VNNI saturate"
            if quantized
            else "report the model's operators: the exporter changes its results"
        )
        raise ExportError(f"{onnx_path} does not compute what the model computes: {problem}", hint=hint)
    return parity


def without_quantizers(model: Model) -> Model | None:
    """Return a copy of a quantized model that computes in float, without any rounding; None if it has no quantizers."""
    if not any(op_name(node) in QUANTIZERS for node in calls(model.graph)):
        return None
    copy = model.clone()
    for node in list(calls(copy.graph)):
        if op_name(node) in QUANTIZERS:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            copy.graph.graph.erase_node(node)
    copy.graph.graph.lint()
    copy.graph.recompile()
    return copy


def _samples(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = model.flat_inputs(*args, **kwargs)
    for tensor, spec in zip(tensors, model.spec.inputs, strict=True):
        axis = spec.batch_axis()
        if axis is not None:
            return tensor.shape[axis]
    return model.spec.fixed_batch or 1


class _Totals:
    """Sums over batches and outputs."""

    def __init__(self) -> None:
        self.samples = 0
        self._values = 0
        self._largest_difference = 0.0
        self._magnitude = 0.0
        self._squares = {"difference": 0.0, "output": 0.0, "noise": 0.0}
        self._differing = 0

    def add(self, expected: list[Tensor], found: list[Tensor], floats: list[Tensor], *, samples: int) -> None:
        self.samples += samples
        for reference, value, unrounded in zip(expected, found, floats, strict=True):
            if reference.shape != value.shape or reference.dtype != value.dtype:
                raise ExportError(
                    "the file gives an output of another form than the model's "
                    f"({list(reference.shape)}, {reference.dtype})",
                    value=(list(value.shape), str(value.dtype)),
                )
            reference, value, unrounded = reference.double(), value.double(), unrounded.double()
            # Infinities and NaNs in the same places are the model's own.
            same = (reference == value) | (reference.isnan() & value.isnan())
            difference = torch.where(same, 0.0, (reference - value).abs())
            magnitude = torch.where(reference.isfinite(), reference.abs(), 0.0)
            if not difference.numel():
                continue
            self._values += difference.numel()
            largest = float(difference.max())
            self._largest_difference = largest if math.isnan(largest) else max(self._largest_difference, largest)
            self._magnitude = max(self._magnitude, float(magnitude.max()))
            self._differing += int((difference > FLOAT_TOLERANCE * magnitude.max()).sum())
            self._squares["difference"] += float(difference.square().sum())
            self._squares["output"] += float(magnitude.square().sum())
            self._squares["noise"] += float((reference - unrounded).nan_to_num(0.0, 0.0, 0.0).square().sum())

    def result(self, *, quantized: bool) -> Parity:
        squares = self._squares
        ratio = math.sqrt(squares["difference"] / squares["noise"]) if quantized and squares["noise"] else None
        return Parity(
            max_abs_diff=self._largest_difference,
            samples=self.samples,
            max_magnitude=self._magnitude,
            relative_rms=math.sqrt(squares["difference"] / squares["output"]) if squares["output"] else 0.0,
            differing_fraction=self._differing / self._values if self._values else 0.0,
            quantized=quantized,
            noise_ratio=ratio,
        )
