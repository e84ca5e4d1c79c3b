"""The steps that a model is put through: each is timed, a failure is recorded, and what can still be tried is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mil_cli.graph.model import Model
from scripts.zoo.sample import Sample, enliven

Row = dict[str, Any]
Result = TypeVar("Result")


class Steps:
    """Does steps one by one and reports what is known after each.

    Args:
        name: ``catalogue module:model``.
        report: Takes the row so far.

    Attributes:
        row: Figures; the steps that failed with the reason, under ``failed`` where the original does not fail and under
            ``original`` where it does; and seconds of processor time by step.
    """

    def __init__(self, name: str, report: Callable[[Row], None]) -> None:
        self.row: Row = {"name": name, "failed": {}, "original": {}, "seconds": {}}
        self._report = report

    def do(
        self, name: str, step: Callable[[], Result], of_original: Callable[[], object] | None = None
    ) -> Result | None:
        """Return what a step gives; None, and the reason in the row, where it fails.

        Args:
            name: The step's name.
            step: Does it.
            of_original: Does the same to the original; where that fails too, the failure is the original's.
        """
        self.row["step"] = name
        self._report(self.row)
        start = time.process_time()
        try:
            return step()
        except Exception as error:
            self.row["failed"][name] = _in_words(error)
        finally:
            self.row["seconds"][name] = round(time.process_time() - start, 2)
        if of_original is not None:
            try:
                of_original()
            except Exception as error:
                self.row["original"][name] = _in_words(error)
                del self.row["failed"][name]
        return None

    def finish(self) -> None:
        """Report the row as done."""
        self.row.pop("step", None)
        self._report(self.row)


def built(build: Callable[[], Sample]) -> Sample:
    """Return a model whose weights hide nothing."""
    sample = build()
    enliven(sample)
    return sample


def captured(sample: Sample) -> Model:
    """Return the captured model of a sample.

    Raises:
        ValueError: Its outputs are not finite, or all zero.
    """
    model = Model.capture(sample.module, sample.args, sample.kwargs)
    with torch.no_grad():
        outputs = floats(model, model(*model.samples[0], **model.samples[1]))
    if not all(bool(torch.isfinite(output).all()) and float(output.abs().max()) > 0 for output in outputs):
        raise ValueError("the outputs are not finite, or all zero: nothing could be compared")
    return model


def captured_by_torch(sample: Sample) -> None:
    """Capture as torch does by itself, with fixed sizes."""
    torch.export.export(copy.deepcopy(sample.module).eval(), sample.args, sample.kwargs)


def floats(model: Model, outputs: Any) -> list[Tensor]:
    """Return the outputs of a model that are floating-point tensors."""
    return [tensor for tensor in model.flatten_outputs(outputs) if tensor.is_floating_point()]


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}" if lines else type(error).__name__
